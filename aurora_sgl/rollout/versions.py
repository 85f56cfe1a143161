"""Versions in and out of the store: import, export, list, show, pin."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import atomic, store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError, Unusable
from aurora_sgl.rollout.why_not import NotLive, not_live
from aurora_sgl.store import queries
from aurora_sgl.store.models import Deployment, DeploymentGroup, DrafterVersion, Evaluation

if TYPE_CHECKING:
    import torch

    from aurora_sgl.drafter.config import DrafterConfig
    from aurora_sgl.drafter.target import TargetInfo


@dataclass(frozen=True)
class VersionLine:
    """A row of ``versions list``."""

    version: DrafterVersion
    aliases: tuple[str, ...]
    served: (
        queries.accept_lengths.AcceptLength | None
    )  # over all draft shapes; None: has not served yet
    not_live: NotLive | None  # why it is not live; None: it is


@dataclass(frozen=True)
class VersionDetails:
    """What ``versions show`` shows."""

    line: VersionLine
    lineage: list[int]  # parent, its parent, ...
    evaluations: list[Evaluation]
    deployments: list[Deployment]
    has_weights: bool


def import_version(
    engine: Engine,
    artifacts: ArtifactRoot,
    path: Path,
    group: DeploymentGroup | int | str,
    *,
    source: str = "import",
    parent_id: int | None = None,
    training_run_id: int | None = None,
    note: str = "",
    metrics: Mapping[str, Any] | None = None,
    target: TargetInfo | None = None,
) -> DrafterVersion:
    """Make a drafter folder a version of a group (the row, its id or its name).

    The folder is validated (against ``target`` too, when given), hashed and copied to
    ``versions/<weights_sha256[:16]>/``. The same weights again give the version that is there.
    Weights in several files are stored as one ``model.safetensors``, and a published drafter as
    SGLang serves it (``drafter.served``).
    Raises ``Unusable`` with the first problem of the folder, ``AuroraError`` for any other one;
    nothing is written then.
    """
    from aurora_sgl.drafter import architectures, checkpoint, served  # torch is slow to import

    path = Path(path)
    tensors, config = _read_drafter(path, target)
    weights_sha256 = checkpoint.content_sha256(tensors)
    uri = f"versions/{weights_sha256[:16]}/"
    with store.session(engine, write=False) as s:
        owner = _group(s, group)
        if config.architecture != owner.draft_architecture:
            raise Unusable(
                f"{path} is a {config.architecture}, group {owner.name!r} runs "
                f"{owner.draft_architecture}"
            )
        if parent_id is not None and queries.versions.version(s, parent_id).group_id != owner.id:
            raise AuroraError(f"parent version {parent_id} belongs to another group")
        stored_version = queries.versions.version_by_sha256(s, owner.id, weights_sha256)
    if stored_version is None or stored_version.pruned_at is not None or not artifacts.exists(uri):
        with served.as_stored(path, config) as folder:
            artifacts.put_folder(folder, uri)
    with store.session(engine) as s:
        version, _ = queries.versions.add_version(
            s,
            group_id=owner.id,
            parent_id=parent_id,
            architecture=config.architecture,
            weights_uri=uri,
            weights_sha256=weights_sha256,
            vocab_sha256=checkpoint.vocab_sha256(tensors),
            draft_vocab_size=config.draft_vocab_size,
            target_model=owner.target_model,
            target_revision=owner.target_revision,
            training_run_id=training_run_id,
            source=source,
            note=note,
            config=architectures.to_json(config),
            metrics=metrics,
        )
        if version.pruned_at is not None:
            queries.versions.set_restored(s, version.id)
    return version


def _read_drafter(
    path: Path, target: TargetInfo | None
) -> tuple[dict[str, torch.Tensor], DrafterConfig]:
    """Raises ``Unusable``, whatever is odd about the folder."""
    from aurora_sgl.drafter import architectures, checkpoint, served

    try:
        problems = checkpoint.validate(path, target)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise Unusable(f"{path} can't be imported: {problems[0]}{more}")
        config = architectures.read_config(path, target_layers=target.num_layers if target else 0)
        return served.tensors_of(path, config), config
    except Unusable:
        raise
    except Exception as error:  # a config.json or weights of a make that nobody thought of
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unusable(f"{path} can't be imported: {why}") from error


def export_version(
    engine: Engine, artifacts: ArtifactRoot, version_id: int, into: Path, *, force: bool = False
) -> Path:
    """Copy a version's folder out; any SGLang loads it. The copy is hashed and compared.

    Raises ``AuroraError`` when ``into`` has something in it (``force`` replaces it), when the
    weights were pruned, or when they do not have the hash of the version.
    """
    into = Path(into)
    if into.exists() and (not into.is_dir() or any(into.iterdir())) and not force:
        raise AuroraError(f"{into} is not empty; choose another folder or add --force")
    with store.session(engine, write=False) as s:
        version = queries.versions.version(s, version_id)
    with atomic.written(into) as new:
        fetch_verified(artifacts, version, new)
    return into


def fetch_verified(artifacts: ArtifactRoot, version: DrafterVersion, into: Path) -> Path:
    """A local copy of a version's folder whose tensors have the version's hash.

    Raises ``AuroraError`` when they have not; the copy is gone then.
    """
    from aurora_sgl.drafter import checkpoint

    if version.pruned_at is not None:
        raise AuroraError(f"the weights of version {version.id} were deleted by db prune")
    artifacts.fetch_folder(version.weights_uri, into)
    try:
        sha256 = checkpoint.content_sha256(checkpoint.read_tensors(into))
        if sha256 != version.weights_sha256:
            raise AuroraError(
                f"{version.weights_uri} has hash {sha256[:16]}, version {version.id} says "
                f"{version.weights_sha256[:16]}: the file was changed or damaged"
            )
    except AuroraError:
        shutil.rmtree(into, ignore_errors=True)
        raise
    return into


def list_versions(engine: Engine, group: str) -> list[VersionLine]:
    """Oldest first."""
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, group).id
        names = queries.aliases.aliases(s, group_id)
        served = {
            row.version_id: row
            for row in queries.accept_lengths.accept_length_by_version(s, group_id)
        }
        reasons = not_live(s, group_id)
        return [_line(v, names, served, reasons) for v in queries.versions.versions(s, group_id)]


def show_version(engine: Engine, artifacts: ArtifactRoot, version_id: int) -> VersionDetails:
    """Raises ``AuroraError`` for an unknown version."""
    with store.session(engine, write=False) as s:
        version = queries.versions.version(s, version_id)
        served = {
            row.version_id: row
            for row in queries.accept_lengths.accept_length_by_version(s, version.group_id)
        }
        lineage: list[int] = []
        parent = version.parent_id
        while parent is not None and parent not in lineage:
            lineage.append(parent)
            parent = queries.versions.version(s, parent).parent_id
        history = queries.deployments.deployments(s, version.group_id)
        return VersionDetails(
            line=_line(
                version,
                queries.aliases.aliases(s, version.group_id),
                served,
                not_live(s, version.group_id),
            ),
            lineage=lineage,
            evaluations=list(queries.evaluations.evaluations(s, version_id)),
            deployments=[
                row for row in history if version_id in (row.version_id, row.previous_version_id)
            ],
            has_weights=version.pruned_at is None and artifacts.exists(version.weights_uri),
        )


def resolve_version(engine: Engine, group: str, name: str) -> int:
    """A version id from what a person types: an id, an alias, or the start of a hash (at least
    six characters). Raises ``AuroraError`` when nothing fits."""
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, group).id
        names = queries.aliases.aliases(s, group_id)
        if name in names:
            return names[name]
        if name.isdecimal() and len(name) < 12:
            return queries.versions.version(s, int(name)).id
        if len(name) >= 6:
            version = queries.versions.version_by_sha256(s, group_id, name.lower())
            if version is not None:
                return version.id
    raise AuroraError(f"no version {name!r} in group {group!r}; see: aurora-sgl versions list")


def _group(s: Session, group: DeploymentGroup | int | str) -> DeploymentGroup:
    if isinstance(group, str):
        return queries.groups.group_by_name(s, group)
    return queries.groups.group(s, group if isinstance(group, int) else group.id)


def _line(
    version: DrafterVersion,
    names: Mapping[str, int],
    served: Mapping[int, queries.accept_lengths.AcceptLength],
    reasons: Mapping[int, NotLive],
) -> VersionLine:
    here: Sequence[str] = [name for name, target in names.items() if target == version.id]
    return VersionLine(
        version, tuple(sorted(here)), served.get(version.id), reasons.get(version.id)
    )
