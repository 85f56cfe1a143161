"""A staged rollout: a version on some servers first, judged against the others at the same time.

No deployment: the servers of the stage follow its version (``queries.aliases.wanted_version``), the
alias ``live`` stays. What comes of it is a promotion, by itself or by hand, or the servers go back.
:func:`tick` carries a stage on from the store alone, as the watch over a promotion.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import WatchSettings
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.intervals import AcceptCounts, accept_length, or_none
from aurora_sgl.rollout import watch
from aurora_sgl.rollout.live_traffic import Comparison, compare, paces, speeds, strata
from aurora_sgl.rollout.promote import (
    Change,
    expect,
    promote,
    require_fitting,
    require_unmarked,
)
from aurora_sgl.rollout.switches import AUTO_PROMOTE
from aurora_sgl.store import queries
from aurora_sgl.store.liveness import LOST_SECONDS, is_silent
from aurora_sgl.store.models import RolloutStage, Server
from aurora_sgl.store.queries.request_counts import RequestCounts
from aurora_sgl.store.store_clock import store_now

#: Who goes on with a stage that passed.
ACTOR = "stage"
#: Seconds within which the servers of a stage must run its version.
ARRIVE_SECONDS = 600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagePlan:
    """What was begun, or with ``dry_run`` would be."""

    stage_id: int | None
    version_id: int
    baseline_id: int
    servers: tuple[str, ...]  # that run it first
    others: tuple[str, ...]  # that it is judged against
    goes_on: bool
    dry_run: bool


@dataclass(frozen=True)
class StageStatus:
    """A stage, and how many windows end it well."""

    stage: RolloutStage
    planned: int

    @property
    def is_open(self) -> bool:
        return self.stage.status in queries.stages.OPEN

    @property
    def sentence(self) -> str:
        """Without its version and its servers."""
        one = self.stage
        if one.status == "running":
            last = f", the last: {one.windows[-1]['verdict']}" if one.windows else ""
            return one.outcome or f"{len(one.windows)} of {self.planned} windows are over{last}"
        if one.status == "passed":
            after = "goes on by itself" if one.goes_on else "waits for somebody to continue it"
            return f"{one.outcome}; it {after}"
        return f"{one.status}: {one.outcome}"


def chosen_servers(wanted: str, running: Sequence[Server]) -> list[str]:
    """Names of the servers of a stage, by what somebody asked for: a number (``1``), a share
    (``25%``, rounded up), or names with commas between them. Servers that draft come first.

    Raises ``AuroraError`` for what is none of these or names a server that does not run, and
    ``Refused`` when no other server would be left.
    """
    order = sorted(running, key=lambda row: (row.phase == "off", row.name))
    names = [row.name for row in order]
    asked = wanted.strip()
    number = asked.removesuffix("%").strip()
    if asked.endswith("%") and number.replace(".", "", 1).isdecimal() and float(number) <= 100:
        count = math.ceil(len(names) * float(number) / 100)
    elif asked.isdecimal() and asked not in names:
        count = int(asked) if len(asked) < 10 else len(names) + 1
    else:
        picked = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
        unknown = [name for name in picked if name not in names]
        if unknown or not picked:
            raise AuroraError(
                f"no running server is called {unknown[0] if unknown else asked!r}; there is: "
                f"{', '.join(names) or 'none'}"
            )
        names, count = [*picked, *(name for name in names if name not in picked)], len(picked)
    if count < 1:
        raise AuroraError("a stage needs at least one server, as in --stage 1")
    if count >= len(names):
        raise Refused(
            f"a stage of {count} needs another server to be judged against, and {len(names)} of "
            "this group run; promote without --stage"
        )
    return names[:count]


def start(
    engine: Engine,
    version_id: int,
    servers: str,
    *,
    actor: str,
    reason: str,
    goes_on: bool = False,
    expected_live: int | None = None,
    settings: WatchSettings | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> StagePlan:
    """Put a version on some servers of its group, see :func:`chosen_servers`. ``goes_on``: to the
    rest by itself, once it passed.

    Raises ``Refused`` and ``AuroraError`` as ``promote`` does, also when the version is live, when
    nothing is, and while another stage or, without ``force``, a watch goes on.
    """
    if not actor.strip() or not reason.strip():
        raise AuroraError("a stage needs an actor and a reason (--reason)")
    rules = settings or WatchSettings()
    with store.session(engine) as s:
        version = queries.versions.version(s, version_id)
        group = queries.groups.lock_group(s, version.group_id)
        live = queries.aliases.aliases(s, group.id).get("live")
        if expected_live is not None:
            expect(expected_live, live, "stage", version_id)
        _require(s, group.id, version_id, live, force=force)
        require_fitting(version, group)
        if not force:
            require_unmarked(s, version_id)
        assert live is not None
        running = _heard_of(queries.servers.servers(s, group.id), store_now(s))
        names = chosen_servers(servers, running)
        others = tuple(sorted(row.name for row in running if row.name not in names))
        stage_id = None
        if not dry_run:
            row = queries.stages.add_stage(
                s, group.id, version_id=version_id, baseline_id=live, generation=group.generation,
                servers=names, goes_on=goes_on, actor=actor.strip(), reason=reason.strip(),
                settings=rules.model_dump(mode="json"),
            )  # fmt: skip
            stage_id = row.id
            _write_down(s, row, actor, "stage_start", reason, goes_on=goes_on)
    return StagePlan(stage_id, version_id, live, tuple(names), others, goes_on, dry_run)


def go_on(
    engine: Engine,
    group: str,
    *,
    actor: str,
    reason: str,
    force: bool = False,
    dry_run: bool = False,
) -> Change:
    """Promote the version of the stage that is open to all servers, and start the watch over it.

    Raises ``Refused`` when none is open, and without ``force`` when it has not passed.
    """
    with store.session(engine, write=False) as s:
        stage = _open(s, queries.groups.group_by_name(s, group).id)
        status = _status(stage)
        evidence = _evidence(stage)
    if stage.status != "passed" and not force:
        raise Refused(
            f"version {stage.version_id} is not judged yet on {', '.join(stage.servers)}: "
            f"{status.sentence}; wait, or add --force"
        )
    return promote(
        engine, stage.version_id, actor=actor, reason=reason, expected_live=stage.baseline_id,
        evidence=evidence, force=force, dry_run=dry_run,
    )  # fmt: skip


def abort(
    engine: Engine, group: str, *, actor: str, reason: str, dry_run: bool = False
) -> StageStatus:
    """Take the version off the servers of the stage. Raises ``Refused`` when none is open."""
    if not actor.strip() or not reason.strip():
        raise AuroraError("aborting a stage needs an actor and a reason (--reason)")
    with store.session(engine) as s:
        group_id = queries.groups.lock_group(s, queries.groups.group_by_name(s, group).id).id
        stage = _open(s, group_id)
        if not dry_run:
            queries.stages.end_stage(s, stage, "aborted", f"by {actor.strip()}: {reason.strip()}")
            _write_down(s, stage, actor, "stage_abort", reason)
        return _status(stage)


def current(engine: Engine, group: str) -> StageStatus | None:
    """The newest stage of a group, open or not; ``None``: there was none."""
    with store.session(engine, write=False) as s:
        stages = queries.stages.stages(s, queries.groups.group_by_name(s, group).id, limit=1)
        return _status(stages[0]) if stages else None


def tick(engine: Engine, group_id: int, *, now: datetime | None = None) -> StageStatus | None:
    """Close the windows of the stage that are over and act on them; ``None``: none is open.

    Worse beyond doubt, or ``failures`` windows that are bad or empty: its servers go back. After
    ``windows`` good ones it has passed, and goes on to the rest if that was asked for and nothing
    that keeps versions from going live by themselves stands against it.
    """
    moment = now or utc_now()
    with store.session(engine) as s:
        stage = queries.stages.open_stage(s, group_id, lock=True)
        if stage is None:
            return None
        if stage.status == "running":
            _carry_on(s, stage, moment)
        status = _status(stage)
        evidence = _evidence(stage)
    if stage.status == "passed" and stage.goes_on:
        _go_on_by_itself(engine, stage, evidence)
        with store.session(engine, write=False) as s:
            return _status(s.get_one(RolloutStage, stage.id))
    return status


def _carry_on(s: Session, stage: RolloutStage, moment: datetime) -> None:
    rules = WatchSettings.model_validate(stage.settings)
    staged, others = _servers(s, stage)
    if not _has_arrived(s, stage, staged, others, moment):
        return
    while (verdict := watch.outcome([one["verdict"] for one in stage.windows], rules)) is None:
        window = _next_window(s, stage, rules, moment, _share(staged, others))
        if window is None:
            return
        log.info("stage of version %d: %s", stage.version_id, window["reason"])
        stage.windows = [*stage.windows, window]
        s.flush()
    last = stage.windows[-1]["reason"]
    if verdict == "failed":
        _fail(s, stage, last)
        return
    stage.status, stage.outcome = "passed", f"{len(stage.windows)} windows, the last: {last}"
    _mark(s, stage, "pass")
    _write_down(s, stage, ACTOR, "stage_pass", stage.outcome)


def _has_arrived(
    s: Session,
    stage: RolloutStage,
    staged: Sequence[Server],
    others: Sequence[Server],
    moment: datetime,
) -> bool:
    """Whether all of its servers that are there run the version, with another one beside them. A
    stage that can't be judged says so, and one whose version is refused fails."""
    waited = (moment - stage.started_at).total_seconds()
    behind = [row for row in staged if row.live_version_id != stage.version_id]
    if not staged or not others:
        stage.outcome = (
            f"no server of the stage ({', '.join(stage.servers)}) is heard of" if not staged
            else "no other server is heard of to judge it against"
        )  # fmt: skip
        return False
    if behind and not stage.windows:
        errors = [f"{row.name}: {row.last_error}" for row in behind if row.last_error]
        if waited >= ARRIVE_SECONDS:
            why = errors[0] if errors else f"{behind[0].name} does not run it"
            _fail(s, stage, f"it did not arrive within {ARRIVE_SECONDS:.0f} s ({why})")
            return False
        names = ", ".join(row.name for row in behind)
        stage.outcome = errors[0] if errors else f"it is on its way to {names}"
        return False
    stage.outcome = ""
    return True


def _next_window(
    s: Session,
    stage: RolloutStage,
    rules: WatchSettings,
    moment: datetime,
    share: float,
) -> dict[str, Any] | None:
    """The next window, or ``None`` while it goes on: as those of the watch, but what is expected
    is what the others serve at the same time."""
    windows = stage.windows
    begun = datetime.fromisoformat(windows[-1]["finished_at"]) if windows else stage.started_at
    clusters = queries.request_counts.request_counts(
        s, stage.group_id, stage.version_id, since=begun
    )
    others = _by_the_others(s, stage)
    expected = strata(others)
    if count := watch.filled(clusters, expected, rules):
        if not _comparable(clusters[:count], expected) and not _is_late(clusters, rules, moment):
            return None  # the others may serve the like in a while
        end = clusters[count - 1].finished_at + timedelta(microseconds=1)
        return _close(s, stage, begun, end, clusters[:count], others, rules)
    first = queries.requests.first_finished(s, stage.group_id, begun)
    if first is None:
        return None  # no traffic is no evidence
    end = first + timedelta(seconds=rules.seconds / share)
    if moment < end:
        return None
    inside = [one for one in clusters if one.finished_at < end]
    return _close(s, stage, begun, end, inside, others, rules)


def _share(staged: Sequence[Server], others: Sequence[Server]) -> float:
    """Of steps with drafts on the servers of the stage, by which a window is stretched. Not where
    they left drafts out because of the version, which the others do not: that is no lack of
    traffic."""
    if all(row.phase == "off" for row in staged) and any(row.phase != "off" for row in others):
        return 1.0
    return max([watch.LEAST_SHARE, *(row.speculation_share or 0.0 for row in staged)])


def _by_the_others(s: Session, stage: RolloutStage) -> list[RequestCounts]:
    """Requests of the baseline since the stage began: only the others serve it then, and what the
    stage's own servers finished before their swap."""
    return queries.request_counts.request_counts(
        s, stage.group_id, stage.baseline_id, since=stage.started_at,
        limit=watch.BASELINE_REQUESTS, newest=True,
    )  # fmt: skip


def _comparable(clusters: Sequence[RequestCounts], expected: dict[str, AcceptCounts]) -> bool:
    return compare(clusters, expected) is not None


def _is_late(clusters: Sequence[RequestCounts], rules: WatchSettings, moment: datetime) -> bool:
    return (moment - clusters[0].finished_at).total_seconds() >= rules.seconds


def _close(
    s: Session,
    stage: RolloutStage,
    begun: datetime,
    end: datetime,
    clusters: Sequence[RequestCounts],
    others: Sequence[RequestCounts],
    rules: WatchSettings,
) -> dict[str, Any]:
    expected = strata(others)
    compared: Comparison | None = None
    speed = None
    if len(clusters) < 2:
        what = f"{len(clusters)} requests with drafts of version {stage.version_id}"
        judged = watch.Verdict("empty", f"{what} in its window")
    else:
        earlier = queries.request_counts.request_counts(
            s, stage.group_id, stage.version_id, since=stage.started_at, until=begun
        )
        judged, compared = watch.judge(clusters, expected, rules, earlier)
        if compared is None:
            judged = watch.Verdict("empty", "the others served nothing of the kind meanwhile")
        else:
            speed = _speed(s, stage, clusters, others, compared)
            if judged.verdict == "pass" and speed and (
                speed[0] < (1 - rules.speed_margin) * speed[1]
            ):  # fmt: skip
                slow = f"{speed[0]:.1f} tokens/s of a stream, the others {speed[1]:.1f}"
                judged = watch.Verdict("bad", f"{judged.reason}; {slow}")
    steps = sum(one.verify_steps for one in clusters)
    alone = or_none(accept_length(sum(one.accepted for one in clusters), steps))
    return {
        "number": len(stage.windows) + 1,
        "started_at": begun.isoformat(),
        "finished_at": end.isoformat(),
        "requests": len(clusters),
        "verify_steps": steps,
        "accept_length": compared.accept_length if compared else alone,
        "expected_accept_length": compared.expected if compared else None,
        "tokens_per_second": speed[0] if speed else None,
        "expected_tokens_per_second": speed[1] if speed else None,
        "verdict": judged.verdict,
        "reason": judged.reason,
        "compared": asdict(compared) if compared else None,
    }


def _speed(
    s: Session,
    stage: RolloutStage,
    clusters: Sequence[RequestCounts],
    others: Sequence[RequestCounts],
    compared: Comparison,
) -> tuple[float, float] | None:
    of_requests = queries.steps.steps_of_requests
    here = of_requests(s, [one.request_id for one in clusters], stage.version_id)
    there = of_requests(s, [one.request_id for one in others], stage.baseline_id)
    return speeds(paces(here), paces(there), compared.accept_length / compared.expected)


def _fail(s: Session, stage: RolloutStage, why: str) -> None:
    queries.stages.end_stage(s, stage, "failed", why)
    _mark(s, stage, "fail")
    _write_down(s, stage, ACTOR, "stage_fail", why)
    log.warning("stage of version %d: %s; its servers go back", stage.version_id, why)


def _go_on_by_itself(engine: Engine, stage: RolloutStage, evidence: dict[str, Any]) -> None:
    try:
        promote(
            engine, stage.version_id, actor=ACTOR,
            reason=f"it passed on {', '.join(stage.servers)}: {stage.outcome}",
            expected_live=stage.baseline_id, evidence=evidence, only_if_on=AUTO_PROMOTE,
        )  # fmt: skip
    except Refused as refusal:
        log.info("the stage of version %d waits: %s", stage.version_id, refusal)


def _mark(s: Session, stage: RolloutStage, verdict: str) -> None:
    """The version's evaluation by live traffic."""
    length, expected = watch.mean_lengths(stage.windows)
    queries.evaluations.add_evaluation(
        s,
        candidate_id=stage.version_id,
        baseline_id=stage.baseline_id,
        kind="live",
        requests=sum(one["requests"] for one in stage.windows),
        verdict=verdict,
        candidate_accept_length=length,
        baseline_accept_length=expected,
        difference=length - expected if length and expected else None,
        details={"stage_id": stage.id, "servers": stage.servers, "reason": stage.outcome,
                 "windows": stage.windows},
    )  # fmt: skip


def _evidence(stage: RolloutStage) -> dict[str, Any]:
    return {"stage_id": stage.id, "stage": stage.status, "servers": stage.servers,
            "windows": stage.windows}  # fmt: skip


def _write_down(s: Session, stage: RolloutStage, actor: str, action: str, reason: str, **more: Any
                ) -> None:  # fmt: skip
    queries.audit.add_audit(
        s, stage.group_id, actor=actor, action=action, subject=f"version {stage.version_id}",
        reason=reason,
        after={"stage": stage.id, "servers": stage.servers, "windows": len(stage.windows), **more},
    )  # fmt: skip


def _status(stage: RolloutStage) -> StageStatus:
    return StageStatus(stage, WatchSettings.model_validate(stage.settings).windows)


def _open(s: Session, group_id: int) -> RolloutStage:
    stage = queries.stages.open_stage(s, group_id)
    if stage is None:
        raise Refused("no staged rollout is open in this group; begin one with promote --stage 1")
    return stage


def _heard_of(rows: Sequence[Server], moment: datetime) -> list[Server]:
    """The newest boot of each name that is not silent."""
    by_name: dict[str, Server] = {}
    for row in rows:  # newest first
        if not is_silent(row.last_seen_at, moment, LOST_SECONDS):
            by_name.setdefault(row.name, row)
    return list(by_name.values())


def _servers(s: Session, stage: RolloutStage) -> tuple[list[Server], list[Server]]:
    """Those of the stage and the others that are heard of."""
    rows = _heard_of(queries.servers.servers(s, stage.group_id), store_now(s))
    staged = [row for row in rows if row.name in stage.servers]
    return staged, [row for row in rows if row.name not in stage.servers]


def _require(s: Session, group_id: int, version_id: int, live: int | None, *, force: bool) -> None:
    stage = queries.stages.open_stage(s, group_id)
    trial = queries.trials.running_trial(s, group_id)
    watched = queries.watches.running_watch(s, group_id)
    if live is None:
        raise Refused("nothing is live in this group; promote without --stage")
    if live == version_id:
        raise Refused(f"version {version_id} is live already")
    if stage is not None:
        raise Refused(
            f"{queries.stages.where(stage)}; continue or abort that first (promote --continue, "
            "promote --abort)"
        )
    if trial is not None:
        raise Refused(f"trial {trial.id} of version {trial.candidate_id} is running; wait or stop")
    if watched is not None and not force:
        raise Refused(
            f"version {watched.version_id} is being watched since its promotion; wait until that "
            "ends, or add --force"
        )
