"""Promote and roll back: the only two ways in which the alias ``live`` moves.

Each takes the row lock of the group, checks what the caller expected to be live, counts the
generation up by one and appends a row to ``deployment``. Servers follow by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.rollout import freezes
from aurora_sgl.store import queries
from aurora_sgl.store.liveness import is_silent
from aurora_sgl.store.models import DeploymentGroup, DrafterVersion

#: ``expected_live`` of a caller that expects that nothing is live yet.
NONE_LIVE = 0
#: Seconds that servers have to follow a deployment before another promotion may overtake it.
SETTLE_SECONDS = 60.0


@dataclass(frozen=True)
class Change:
    """What was done, or with ``dry_run`` would be done."""

    action: str  # promote | rollback
    group: str
    version_id: int
    previous_version_id: int | None  # live before
    generation: int  # of the group, after
    changed: bool  # False: it was live already, nothing was written
    dry_run: bool
    before: dict[str, int]  # alias -> version id
    after: dict[str, int]


def promote(
    engine: Engine,
    version_id: int,
    *,
    actor: str,
    reason: str,
    expected_live: int | None = None,
    evaluation_id: int | None = None,
    evidence: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    force: bool = False,
    only_if_on: str = "",
) -> Change:
    """Make a version the live one of its group, and start the watch over it.

    ``expected_live``: the version that the caller saw live (``NONE_LIVE``: none). Left out, it is
    what is live when the call begins, so that of two calls at once one wins. A version that is
    live already is left as it is. Raises ``Refused`` when another version is live than expected,
    when the weights were pruned or belong to another target, or, of a version that goes live by
    itself, when the switch ``only_if_on`` is off or the group is frozen; without ``force`` also
    when the evaluation did not pass, when a watch or a stage turned this version down, while a
    trial runs or a stage is not judged, and while servers still follow the deployment before.
    Raises ``AuroraError`` for an unknown version, actor or reason missing.
    """
    _require(actor, reason)
    with store.session(engine, write=False) as s:
        group_id = queries.versions.version(s, version_id).group_id
        live_at_start = queries.aliases.aliases(s, group_id).get("live", NONE_LIVE)
    with store.session(engine) as s:
        group = queries.groups.lock_group(s, group_id)
        version = queries.versions.version(s, version_id)
        before = queries.aliases.aliases(s, group_id)
        live = before.get("live")
        if live == version_id:
            return _unchanged("promote", group, version_id, before, dry_run)
        expect(
            live_at_start if expected_live is None else expected_live, live, "promote", version_id
        )
        require_fitting(version, group)
        if only_if_on:
            _require_allowed(s, group, only_if_on)
        if not force:
            if evaluation_id is not None:
                _require_pass(s, evaluation_id, version_id)
            require_unmarked(s, version_id)
            _require_quiet(s, group_id, version_id)
            _require_settled(s, group_id, version_id)
        after = {**before, "live": version_id}
        if live is not None:
            after["previous"] = live
        if after.get("candidate") == version_id:
            del after["candidate"]
        return _deploy(
            s, group, "promote", version_id, before, after, actor, reason, evidence,
            evaluation_id, dry_run,
        )  # fmt: skip


def rollback(
    engine: Engine,
    group: str,
    *,
    actor: str,
    reason: str,
    to: int | None = None,
    expected_live: int | None = None,
    evidence: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> Change:
    """Make the version live again that was live before (``to``: this earlier one).

    Afterwards ``previous`` is what was live before that one, so a second rollback goes one
    further back and never returns to the version that was left. With ``expected_live`` the call
    can be repeated: once that version was rolled back, nothing more happens. Raises ``Refused``
    when there is nothing to go back to, when ``to`` was never live, or when another version is
    live than expected.
    """
    _require(actor, reason)
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, group).id
        live_at_start = queries.aliases.aliases(s, group_id).get("live", NONE_LIVE)
    with store.session(engine) as s:
        row = queries.groups.lock_group(s, group_id)
        before = queries.aliases.aliases(s, group_id)
        live = before.get("live")
        if live is None:
            raise Refused(f"nothing is live in group {group!r}, so nothing can be rolled back")
        last = queries.deployments.deployments(s, group_id, limit=1)[0]
        if last.action == "rollback" and last.previous_version_id == expected_live and (
            to is None or to == live
        ):  # fmt: skip
            return _unchanged("rollback", row, live, before, dry_run)
        if to == live:
            return _unchanged("rollback", row, live, before, dry_run)
        target = to if to is not None else before.get("previous")
        if target is None:
            raise Refused(
                f"version {live} is the first that was live in group {group!r}; "
                "there is nothing to roll back to, promote another version instead"
            )
        expect(
            live_at_start if expected_live is None else expected_live, live, "roll back to", target
        )
        version = queries.versions.version(s, target)
        was = queries.deployments.promotion_of(s, group_id, target)
        if version.group_id != group_id or was is None:
            raise Refused(f"version {target} was never live in group {group!r}; promote it")
        _require_weights(version)
        after = {**before, "live": target}
        after.pop("previous", None)
        if was.previous_version_id is not None:
            after["previous"] = was.previous_version_id
        return _deploy(
            s, row, "rollback", target, before, after, actor, reason, evidence, None, dry_run
        )


def set_candidate(engine: Engine, version_id: int | None, group_id: int) -> None:
    """Say which version is being looked at; ``None``: none is."""
    with store.session(engine) as s:
        queries.groups.lock_group(s, group_id)
        if version_id is not None and queries.versions.version(s, version_id).group_id != group_id:
            raise AuroraError(f"version {version_id} belongs to another group")
        queries.aliases.set_alias(s, group_id, "candidate", version_id)


def _deploy(
    s: Session,
    group: DeploymentGroup,
    action: str,
    version_id: int,
    before: dict[str, int],
    after: dict[str, int],
    actor: str,
    reason: str,
    evidence: Mapping[str, Any] | None,
    evaluation_id: int | None,
    dry_run: bool,
) -> Change:
    live = before.get("live")
    if dry_run:
        return Change(action, group.name, version_id, live, group.generation + 1, True, True,
                      before, after)  # fmt: skip
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            queries.aliases.set_alias(s, group.id, name, after.get(name))
    _end_what_ran(s, group.id, action, version_id, actor, reason)
    row = queries.deployments.add_deployment(
        s, group, action=action, version_id=version_id, previous_version_id=live,
        actor=actor.strip(), reason=reason.strip(), before=before, after=after,
        evidence=evidence or {}, evaluation_id=evaluation_id,
    )  # fmt: skip
    if action == "promote" and live is not None:
        queries.watches.start_watch(s, group.id, row.generation, version_id, live)
    return Change(action, group.name, version_id, live, row.generation, True, False, before, after)


def _end_what_ran(
    s: Session, group_id: int, action: str, version_id: int, actor: str, why: str
) -> None:
    """A deployment ends the trial, the watch and the stage before it."""
    reason = f"{action} of version {version_id} by {actor.strip()}"
    while (stage := queries.stages.open_stage(s, group_id)) is not None:
        goes_on = action == "promote" and stage.version_id == version_id
        queries.stages.end_stage(s, stage, "continued" if goes_on else "aborted", reason)
        queries.audit.add_audit(
            s, group_id, actor=actor, action="stage_continue" if goes_on else "stage_abort",
            subject=f"version {stage.version_id}", reason=why,
            after={"stage": stage.id, "servers": stage.servers, "windows": len(stage.windows)},
        )  # fmt: skip
    while (trial := queries.trials.running_trial(s, group_id)) is not None:
        queries.trials.end_trial(s, trial, "stopped", verdict="", stopped_by=reason)
    while (watch := queries.watches.running_watch(s, group_id)) is not None:
        queries.watches.end_watch(
            s, watch, "failed" if actor.strip() == "watch" else "ended", reason
        )


def _unchanged(
    action: str, group: DeploymentGroup, version_id: int, aliases: dict[str, int], dry_run: bool
) -> Change:
    return Change(action, group.name, version_id, version_id, group.generation, False, dry_run,
                  aliases, aliases)  # fmt: skip


def _require(actor: str, reason: str) -> None:
    if not actor.strip():
        raise AuroraError("a deployment needs an actor: who does this?")
    if not reason.strip():
        raise AuroraError("a deployment needs a reason; say it with --reason")


def expect(expected: int, live: int | None, action: str, version_id: int) -> None:
    """Raises ``Refused`` when another version is live than the caller saw."""
    if expected != (live or NONE_LIVE):
        raise Refused(
            f"refused to {action} version {version_id}: expected {_name(expected)} to be live, "
            f"but {_name(live or NONE_LIVE)} is; look at it and try again"
        )


def _name(version_id: int) -> str:
    return "no version" if version_id == NONE_LIVE else f"version {version_id}"


def require_fitting(version: DrafterVersion, group: DeploymentGroup) -> None:
    """Raises ``Refused`` for a version whose weights are gone or that drafts for another target."""
    _require_weights(version)
    _require_target(version, group)


def _require_allowed(s: Session, group: DeploymentGroup, switch: str) -> None:
    """Of what nobody decides in person."""
    if not queries.switches.is_on(s, group.id, switch):
        raise Refused(f"{switch} is switched off in group {group.name!r}")
    if frozen := freezes.refusal(s, group.id):
        raise Refused(f"group {group.name!r} is {frozen}")


def _require_weights(version: DrafterVersion) -> None:
    if version.pruned_at is not None:
        raise Refused(
            f"the weights of version {version.id} were deleted on {version.pruned_at:%Y-%m-%d}; "
            "import the same drafter again first"
        )


def _require_target(version: DrafterVersion, group: DeploymentGroup) -> None:
    its = (version.target_model, version.target_revision)
    if its != (group.target_model, group.target_revision):
        raise Refused(
            f"version {version.id} was made for {' '.join(its).strip()}, group {group.name!r} "
            f"serves {group.target_model} {group.target_revision}".rstrip()
        )


def require_unmarked(s: Session, version_id: int) -> None:
    """Raises ``Refused`` when live traffic said of it that it is worse."""
    live = [e for e in queries.evaluations.evaluations(s, version_id) if e.kind == "live"]
    if live and live[0].verdict == "fail":
        by = (
            "taken back by its stage"
            if "stage_id" in live[0].details
            else "rolled back by the watch"
        )
        raise Refused(
            f"version {version_id} was {by} on "
            f"{live[0].created_at:%Y-%m-%d %H:%M} UTC; a person may promote it with --force"
        )


def _require_quiet(s: Session, group_id: int, version_id: int) -> None:
    stage = queries.stages.open_stage(s, group_id)
    if stage is not None and (stage.version_id, stage.status) != (version_id, "passed"):
        raise Refused(
            f"refused to promote version {version_id}: {queries.stages.where(stage)} and not "
            "judged yet; wait, abort it (promote --abort), or add --force"
        )
    trial = queries.trials.running_trial(s, group_id)
    if trial is not None:
        raise Refused(
            f"refused to promote version {version_id}: trial {trial.id} of version "
            f"{trial.candidate_id} is running; wait, stop it (aurora-sgl trial stop), or add "
            "--force"
        )


def _require_settled(s: Session, group_id: int, version_id: int) -> None:
    """One promotion at a time: the servers that can follow the last one have followed."""
    last = queries.deployments.deployments(s, group_id, limit=1)
    now = utc_now()
    if not last or not timedelta(0) <= now - last[0].created_at < timedelta(seconds=SETTLE_SECONDS):
        return
    behind = [
        server.name
        for server in queries.servers.servers(s, group_id)
        if server.live_version_id not in (None, last[0].version_id, version_id)
        and not server.last_error
        and not is_silent(server.last_seen_at, now)
    ]
    if behind:
        raise Refused(
            f"refused to promote version {version_id}: version {last[0].version_id} is still on "
            f"its way to {', '.join(behind)}; wait, or add --force"
        )


def _require_pass(s: Session, evaluation_id: int, version_id: int) -> None:
    evaluation = queries.evaluations.evaluation(s, evaluation_id)
    if evaluation.candidate_id != version_id:
        raise Refused(
            f"evaluation {evaluation_id} is of version {evaluation.candidate_id}, "
            f"not of version {version_id}"
        )
    if evaluation.verdict != "pass":
        raise Refused(
            f"evaluation {evaluation_id} of version {version_id} says {evaluation.verdict}; "
            "a person may promote it with --force"
        )
