"""What an operator does. Each function looks up again who asks, whatever the page showed him."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aurora_sgl import rollout, store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import Refused
from aurora_sgl.evaluation.one_request import PairTask
from aurora_sgl.rollout import versions
from aurora_sgl.rollout.switches import LEARNING
from aurora_sgl.store import queries
from aurora_sgl.store.accounts import OPERATOR, Account
from aurora_sgl.store.liveness import training_lease_name

from . import login, replays, trainings
from .context import Group, now


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
