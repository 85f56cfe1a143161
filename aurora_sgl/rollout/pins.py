"""Pin and unpin: a pinned version keeps its weights, whatever retention says."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.store import queries


@dataclass(frozen=True)
class PinChange:
    """What was done, or with ``dry_run`` would be done."""

    action: str  # pin | unpin
    version_id: int
    pinned: bool  # after
    changed: bool  # False: it was so already, nothing was written
    dry_run: bool


def pin(
    engine: Engine, version_id: int, *, actor: str, reason: str, dry_run: bool = False
) -> PinChange:
    """Keep a version's weights. Raises ``Refused`` when they are gone already, ``AuroraError``
    for an unknown version and without actor or reason."""
    return _set(engine, version_id, True, actor, reason, dry_run)


def unpin(
    engine: Engine, version_id: int, *, actor: str, reason: str, dry_run: bool = False
) -> PinChange:
    """Leave a version's weights to retention again."""
    return _set(engine, version_id, False, actor, reason, dry_run)


def _set(
    engine: Engine, version_id: int, pinned: bool, actor: str, reason: str, dry_run: bool
) -> PinChange:
    action = "pin" if pinned else "unpin"
    if not actor.strip() or not reason.strip():
        raise AuroraError(f"to {action} a version needs an actor and a reason (--reason)")
    with store.session(engine) as s:
        group = queries.groups.lock_group(s, queries.versions.version(s, version_id).group_id)
        version = queries.versions.version(s, version_id)
        changed = version.pinned != pinned
        if pinned and version.pruned_at is not None:
            raise Refused(f"the weights of version {version_id} are gone; there is nothing to pin")
        if changed and not dry_run:
            queries.versions.set_pinned(s, version_id, pinned)
            queries.audit.add_audit(
                s,
                group.id,
                actor=actor,
                action=action,
                subject=f"version {version_id}",
                reason=reason,
                before={"pinned": not pinned},
                after={"pinned": pinned},
            )
    return PinChange(action, version_id, pinned, changed, dry_run)
