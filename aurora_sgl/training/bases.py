"""What a run starts from, and what its result is compared with: mostly the live version for both.

A run of the scheduler goes on from the newest candidate of the present line, so that small gains
add up, while the gate compares with the live version, so that they are proven against what serves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetInfo, read_target
from aurora_sgl.errors import AuroraError
from aurora_sgl.evaluation.line import to_continue
from aurora_sgl.rollout.versions import fetch_verified
from aurora_sgl.store import queries


@dataclass(frozen=True)
class BaseIds:
    """``left``: why training starts from the baseline although it would have gone on from a
    candidate; empty: it does, or there is none."""

    base: int
    baseline: int
    left: str = ""


def base_ids(s: Session, group_id: int, base_id: int | None, *, carry_on: bool) -> BaseIds | None:
    """``None``: no base is named and no version is live. A base that is named is the baseline too;
    ``carry_on``: see :func:`aurora_sgl.evaluation.line.to_continue`."""
    if base_id is not None:
        return BaseIds(base_id, base_id)
    live = queries.aliases.desired_version(s, group_id)
    if live is None:
        return None
    if not carry_on:
        return BaseIds(live[0], live[0])
    candidate, left = to_continue(s, live[0])
    return BaseIds(candidate, live[0], left)


@dataclass(frozen=True)
class Bases:
    """Both drafters in float32, the hashes of their weights, and what target they fit."""

    ids: BaseIds
    base: Drafter
    base_sha256: str
    baseline: Drafter
    baseline_sha256: str
    target: TargetInfo


def load(engine: Engine, artifacts: ArtifactRoot, ids: BaseIds, target: Path, into: Path) -> Bases:
    """Both from the store; the baseline for both where the base is missing, damaged or does not
    fit. Raises ``AuroraError`` when the baseline is."""
    baseline, sha256, info = _version(engine, artifacts, ids.baseline, target, into / "baseline")
    same = Bases(
        BaseIds(ids.baseline, ids.baseline, ids.left), baseline, sha256, baseline, sha256, info
    )
    if ids.base == ids.baseline:
        return same
    try:
        base, sha256, info = _version(engine, artifacts, ids.base, target, into / "base")
    except AuroraError as error:
        left = f"training starts from the live version {ids.baseline}: {error}"
        return replace(same, ids=replace(same.ids, left=left))
    return Bases(ids, base, sha256, baseline, same.baseline_sha256, info)


def _version(
    engine: Engine, artifacts: ArtifactRoot, version_id: int, target: Path, into: Path
) -> tuple[Drafter, str, TargetInfo]:
    with store.session(engine, write=False) as s:
        version = queries.versions.version(s, version_id)
    folder = fetch_verified(artifacts, version, into)
    info = read_target(target, model=version.target_model)
    problems = checkpoint.validate(folder, info)
    if problems:
        raise AuroraError(f"version {version_id} does not fit the target: {problems[0]}")
    return checkpoint.load(folder, target_layers=info.num_layers), version.weights_sha256, info


def base_ratio(s: Session, ids: BaseIds) -> float:
    """Accept length of the base over that of the baseline, by its newest evaluation against it; 1.0
    where they are one, and NaN where the base was never replayed."""
    if ids.base == ids.baseline:
        return 1.0
    for row in queries.evaluations.evaluations(s, ids.base):
        if row.baseline_id == ids.baseline and row.kind == "replay" and not row.domain:
            before, after = row.baseline_accept_length, row.candidate_accept_length
            return after / before if before and after else math.nan
    return math.nan
