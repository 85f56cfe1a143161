"""What an operator does. Each function looks up again who asks, whatever the page showed him."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from aurora_sgl import rollout, store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError, Refused, printable
from aurora_sgl.evaluation.one_request import PairTask
from aurora_sgl.rollout import alerts, versions
from aurora_sgl.rollout.notes import TagChange
from aurora_sgl.rollout.switches import LEARNING
from aurora_sgl.store import queries
from aurora_sgl.store.accounts import OPERATOR, Account
from aurora_sgl.store.liveness import training_lease_name
from aurora_sgl.store.models import FreezeWindow

from . import login, replays, trainings
from .addresses import Address
from .context import Group, now

#: Saved views of a group, and characters of the name of one.
MOST_VIEWS, LONGEST_NAME = 200, 80


def operator() -> Account:
    """Who acts. Raises ``Refused`` unless it is an operator who is logged in at this moment."""
    account = login.account()
    if account is None:
        raise Refused("you were logged out meanwhile; log in again")
    if account.role != OPERATOR:
        raise Refused(f"{account.name} is a viewer and may look only; ask an operator")
    return account


def promote(
    here: Group,
    version_id: int,
    seen_live: int,
    *,
    reason: str,
    force: bool = False,
    evaluation_id: int | None = None,
    evidence: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> rollout.Change:
    """``seen_live``: the version that the page showed as live (0: none)."""
    return rollout.promote(
        here.engine,
        version_id,
        actor=operator().name,
        reason=reason,
        expected_live=seen_live,
        evaluation_id=evaluation_id,
        evidence=evidence,
        force=force,
        dry_run=dry_run,
    )


def stage(
    here: Group,
    version_id: int,
    seen_live: int,
    servers: str,
    *,
    reason: str,
    goes_on: bool,
    force: bool = False,
    dry_run: bool = False,
) -> rollout.stages.StagePlan:
    """``servers``: as ``rollout.stages.chosen_servers`` reads them."""
    return rollout.stages.start(
        here.engine, version_id, servers, actor=operator().name, reason=reason, goes_on=goes_on,
        expected_live=seen_live, force=force, dry_run=dry_run,
    )  # fmt: skip


def continue_stage(here: Group, *, reason: str, force: bool = False) -> rollout.Change:
    actor = operator().name
    return rollout.stages.go_on(here.engine, here.name, actor=actor, reason=reason, force=force)


def abort_stage(here: Group, *, reason: str) -> rollout.stages.StageStatus:
    actor = operator().name
    return rollout.stages.abort(here.engine, here.name, actor=actor, reason=reason)


def freeze(here: Group, starts_at: datetime, ends_at: datetime, *, reason: str) -> FreezeWindow:
    return rollout.freezes.add(
        here.engine, here.name, starts_at=starts_at, ends_at=ends_at, actor=operator().name,
        reason=reason,
    )  # fmt: skip


def lift(here: Group, freeze_id: int, *, reason: str) -> FreezeWindow:
    actor = operator().name
    return rollout.freezes.lift(here.engine, here.name, freeze_id, actor=actor, reason=reason)


def rollback(
    here: Group,
    seen_live: int,
    *,
    reason: str,
    evidence: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> rollout.Change:
    return rollout.rollback(
        here.engine,
        here.name,
        actor=operator().name,
        reason=reason,
        expected_live=seen_live,
        evidence=evidence,
        dry_run=dry_run,
    )


def pin(here: Group, version_id: int, pinned: bool, *, reason: str) -> rollout.PinChange:
    do = rollout.pin if pinned else rollout.unpin
    return do(here.engine, version_id, actor=operator().name, reason=reason)


def turn(here: Group, switch: str, on: bool, *, reason: str) -> rollout.switches.SwitchChange:
    actor = operator().name
    return rollout.switches.turn(here.engine, here.name, switch, on, actor=actor, reason=reason)


def add_note(here: Group, version_id: int, text: str) -> None:
    rollout.notes.add_note(here.engine, version_id, text, actor=operator().name)


def change_tags(here: Group, version_id: int, names: Iterable[str], give: bool) -> TagChange:
    change = rollout.notes.tag if give else rollout.notes.untag
    return change(here.engine, version_id, names, actor=operator().name)


def acknowledge(here: Group, alert_id: int, *, note: str) -> None:
    alerts.acknowledge(here.engine, here.name, alert_id, actor=operator().name, note=note)


def save_view(here: Group, name: str, address: Address) -> None:
    """Raises ``AuroraError`` for a name that is taken, or is none."""
    actor, name = operator().name, printable(" ".join(name.split()))
    if not name or len(name) > LONGEST_NAME:
        raise AuroraError(f"a view needs a name of at most {LONGEST_NAME} characters")
    with store.session(here.engine) as s:
        queries.groups.lock_group(s, here.id)
        rows = queries.saved_views.saved_views(s, here.id)
        if any(row.name.casefold() == name.casefold() for row in rows):
            raise AuroraError(f"there is a view {name!r} already; choose another name")
        if len(rows) >= MOST_VIEWS:
            raise AuroraError(f"a group has at most {MOST_VIEWS} saved views; delete one first")
        row = queries.saved_views.add_saved_view(
            s, here.id, name=name, page=address.page, query=address.query, actor=actor
        )
        # Without its name and its parameters: a purge takes names out of the view, not out of here.
        queries.audit.add_audit(
            s, here.id, actor=actor, action="save view", subject=f"view {row.id}",
            reason=f"to find the page {address.page} like this again",
            after={"page": address.page},
        )  # fmt: skip


def delete_view(here: Group, view_id: int, *, reason: str) -> str:
    """Its name."""
    actor = operator().name
    with store.session(here.engine) as s:
        row = queries.saved_views.saved_view(s, here.id, view_id)
        name, before = row.name, {"page": row.page, "saved by": row.actor}
        queries.saved_views.delete_saved_view(s, row)
        queries.audit.add_audit(
            s, here.id, actor=actor, action="delete view", subject=f"view {view_id}",
            reason=reason, before=before,
        )  # fmt: skip
    return name


def export(here: Group, version_id: int, *, reason: str) -> bytes:
    """A version's folder as a ZIP archive, its weights checked by their hash."""
    actor = operator().name
    with tempfile.TemporaryDirectory(prefix="aurora-export-") as work:
        folder = versions.export_version(
            here.engine, ArtifactRoot(), version_id, Path(work) / f"version-{version_id}"
        )
        packed = Path(work) / "version.zip"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder.parent))
        content = packed.read_bytes()
    _write_down(here, actor, "export", f"version {version_id}", reason, {"bytes": len(content)})
    return content


def train(here: Group, *, reason: str) -> None:
    """Start a training run. Raises ``Refused`` when one goes on, or learning is switched off."""
    actor = operator().name
    with store.session(here.engine, write=False) as s:
        held = queries.leases.lease(s, training_lease_name(here.id))
        learning = queries.switches.is_on(s, here.id, LEARNING)
    if not learning:
        raise Refused("learning is switched off in this group; switch it on first")
    if held is not None and held.expires_at > now():
        raise Refused("a training run of this group is going on; wait until it ends")
    if trainings.ALL.is_running(here.name):
        raise Refused("a training run that was started here is going on; wait until it ends")
    _write_down(here, actor, "train", "a training run", reason, {"trigger": "dashboard"})
    trainings.ALL.start(here.name)


def replay_request(task: PairTask) -> None:
    """Replay a request step by step; it changes nothing. Raises ``Refused`` while another one is
    replayed."""
    operator()
    if not replays.ALL.start(task):
        raise Refused("another request is being replayed just now; try again when that is over")


def _write_down(
    here: Group, actor: str, action: str, subject: str, reason: str, after: Mapping[str, Any]
) -> None:
    with store.session(here.engine) as s:
        queries.audit.add_audit(
            s, here.id, actor=actor, action=action, subject=subject, reason=reason, after=after
        )
