"""What is live where, what goes on, and what comes next: one look at a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import SchedulerSettings
from aurora_sgl.rollout import freezes, run_progress, stages, switches, trial, watch, why_not
from aurora_sgl.rollout.why_not import NotLive, not_live
from aurora_sgl.sequences.held_out import HeldOut, held_out_counts
from aurora_sgl.sequences.splits import GATE_SHARE
from aurora_sgl.step_cost import tree_shares
from aurora_sgl.store import queries
from aurora_sgl.store.liveness import SILENT_SECONDS, is_silent
from aurora_sgl.store.models import Audit, Drift, FreezeWindow, Server
from aurora_sgl.store.store_clock import store_now


@dataclass(frozen=True)
class ServerStatus:
    """How far one server is. ``reason`` says why it does not run what it should."""

    server_id: int
    name: str
    live_version_id: int | None
    live_sha256: str
    wanted_version_id: int | None
    converged: bool
    reason: str
    phase: str
    phase_reason: str
    speculation_share: float | None
    last_seen_at: datetime
    silent: bool  # see ``store.liveness.is_silent``
    notices: tuple[str, ...] = ()  # sentences about what is wrong or switched off in it
    trees: tuple[dict[str, Any], ...] = ()  # see ``step_cost.TreeShare``
    stage_id: int | None = None  # it runs, or should, a version before the rest


@dataclass(frozen=True)
class SchedulerStatus:
    """What the scheduler of a group does, what it will do next, when, and why."""

    alive: bool
    holder: str
    state: str  # waiting, training, gate, trial, watch, cooldown, off
    reason: str
    next_action: str
    next_at: datetime | None
    details: dict[str, Any]
    updated_at: datetime | None


@dataclass(frozen=True)
class LastVerdict:
    """What the gate said of the newest version that it looked at, and why."""

    version_id: int
    verdict: str
    reason: str


@dataclass(frozen=True)
class RetentionStatus:
    """What the last round of retention did, and when the next one is due (by the store's clock)."""

    started_at: datetime | None  # None: there was none yet
    actor: str
    sentence: str  # what went, or why it is not done
    due_at: datetime | None  # None: the group has no limits yet


@dataclass(frozen=True)
class GroupStatus:
    """Everything that ``aurora-sgl status`` shows of a group."""

    group: str
    generation: int
    aliases: dict[str, int]
    wanted_version_id: int | None
    trial_id: int | None  # set while a trial decides what the servers run
    servers: list[ServerStatus]
    switches: list[switches.SwitchState]
    scheduler: SchedulerStatus
    watch: watch.WatchStatus | None
    trial: trial.TrialStatus | None
    stage: stages.StageStatus | None  # the newest, open or not
    freeze: FreezeWindow | None  # that goes on
    last_verdict: LastVerdict | None
    not_live: NotLive | None  # the newest version that was never live, and why
    training: run_progress.RunProgress | None  # the run that goes on
    retention: RetentionStatus


def servers(engine: Engine, group: str) -> list[ServerStatus]:
    """The running servers of a group, by name: what each runs, and why not what it should."""
    with store.session(engine, write=False) as s:
        now = store_now(s)
        group_id = queries.groups.group_by_name(s, group).id
        versions = queries.aliases.wanted_versions(s, group_id)
        hashes: dict[int, str] = {}
        statuses = []
        for row in sorted(queries.servers.servers(s, group_id), key=lambda row: row.name):
            wanted = versions.of(row.name) if versions else None
            want = wanted.version_id if wanted else None
            if want is not None and want not in hashes:
                hashes[want] = queries.versions.version(s, want).weights_sha256
            sha256 = hashes.get(want or 0, "")
            same_bytes = not row.live_sha256 or row.live_sha256 == sha256
            silent = is_silent(row.last_seen_at, now)
            converged = want is None or (row.live_version_id == want and same_bytes)
            reason = ""
            if silent:
                reason = f"not heard of since {row.last_seen_at:%Y-%m-%d %H:%M:%S} UTC"
            elif not converged:
                reason = row.last_error or f"version {want} is on its way"
            statuses.append(
                ServerStatus(row.id, row.name, row.live_version_id, row.live_sha256, want,
                             converged and not silent, reason, row.phase, row.phase_reason,
                             row.speculation_share, row.last_seen_at, silent,
                             _notices(row, reason),
                             tuple(asdict(one) for one in tree_shares(row.counters)),
                             wanted.stage_id if wanted else None)
            )  # fmt: skip
    return statuses


def _notices(row: Server, reason: str) -> tuple[str, ...]:
    """What the server says of itself, and its sidecar where that is not the reason already."""
    notices = [str(row.notices[code]) for code in sorted(row.notices)]
    if row.last_error and row.last_error != reason and row.last_error not in notices:
        notices.append(row.last_error)
    return tuple(notices)


def weights_sha256(engine: Engine, version_id: int | None) -> str:
    """The hash of a version's weights; "" for none."""
    if version_id is None:
        return ""
    with store.session(engine, write=False) as s:
        return queries.versions.version(s, version_id).weights_sha256


def scheduler(engine: Engine, group: str) -> SchedulerStatus:
    """What the scheduler last said; not ``alive`` when there is none, or it went silent."""
    with store.session(engine, write=False) as s:
        row = queries.scheduler_states.scheduler_state(s, queries.groups.group_by_name(s, group).id)
    if row is None:
        why = "no scheduler ever ran for this group; start one with: aurora-sgl scheduler"
        return SchedulerStatus(False, "", "", why, "", None, {}, None)
    age = abs((utc_now() - row.updated_at).total_seconds())
    alive = age < SILENT_SECONDS and row.state != "stopped"
    reason = row.reason if alive else f"the scheduler is gone; it last said: {row.reason}"
    return SchedulerStatus(
        alive, row.holder, row.state, reason, row.next_action, row.next_at,
        dict(row.details), row.updated_at,
    )  # fmt: skip


def held_out(engine: Engine, group: str) -> HeldOut:
    """How many requests that no run trains on a verdict can rest on, and why others are left out.

    By the gate's share of the scheduler's recipe.
    """
    share = SchedulerSettings().recipe.get("gate_share", GATE_SHARE)
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, group).id
        return held_out_counts(s, group_id, gate_share=float(share))


def last_verdict(engine: Engine, group: str) -> LastVerdict | None:
    """``None``: the gate has looked at nothing yet."""
    with store.session(engine, write=False) as s:
        row = queries.evaluations.last_replay(s, queries.groups.group_by_name(s, group).id)
    if row is None:
        return None
    return LastVerdict(row.candidate_id, row.verdict, str(row.details.get("reason", "")))


def retention(engine: Engine, group: str) -> RetentionStatus:
    """What was deleted last, and when it goes on."""
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, group).id
        run, due = queries.prune_runs.last(s, group_id), queries.prune_runs.due_at(s, group_id)
    if run is None:
        return RetentionStatus(None, "", "nothing was pruned yet", due)
    if run.error:
        sentence = f"not done: {run.error}"
    elif run.finished_at is None:
        sentence = "it goes on, or was cut off"
    else:
        sentence = f"{run.report.get('sentence') or 'nothing'} deleted"
    return RetentionStatus(run.started_at, run.actor, sentence, due)


def newest_candidate(engine: Engine, group: str) -> NotLive | None:
    """The newest version that was never live, and why; ``None``: there is none."""
    with store.session(engine, write=False) as s:
        reasons = not_live(s, queries.groups.group_by_name(s, group).id)
    return why_not.newest_candidate(list(reasons.values()))


def drifts(engine: Engine, group: str, *, limit: int = 50) -> Sequence[Drift]:
    """Falls of the live accept length that were detected, newest first."""
    with store.session(engine, write=False) as s:
        return queries.drifts.drifts(s, queries.groups.group_by_name(s, group).id, limit=limit)


def audit(engine: Engine, group: str, *, limit: int = 100) -> Sequence[Audit]:
    """Switches, pins and trials: who, when, why; newest first. Deployments have their own table."""
    with store.session(engine, write=False) as s:
        return queries.audit.audits(s, queries.groups.group_by_name(s, group).id, limit=limit)


def look(engine: Engine, group: str) -> GroupStatus:
    """All of it at once."""
    with store.session(engine, write=False) as s:
        row = queries.groups.group_by_name(s, group)
        names = queries.aliases.aliases(s, row.id)
        wanted = queries.aliases.wanted_version(s, row.id)
    return GroupStatus(
        group=group,
        generation=row.generation,
        aliases=names,
        wanted_version_id=wanted.version_id if wanted else None,
        trial_id=wanted.trial_id if wanted else None,
        servers=servers(engine, group),
        switches=switches.read(engine, group),
        scheduler=scheduler(engine, group),
        watch=watch.status(engine, group),
        trial=trial.status(engine, group),
        stage=stages.current(engine, group),
        freeze=freezes.current(engine, group),
        last_verdict=last_verdict(engine, group),
        not_live=newest_candidate(engine, group),
        training=run_progress.going_on(engine, row.id),
        retention=retention(engine, group),
    )
