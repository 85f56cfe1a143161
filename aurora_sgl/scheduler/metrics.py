"""What the scheduler tells Prometheus: of itself, and of its group as the store has it.

Counters of the group are counts of rows that are never deleted, so that a scheduler that starts
anew, or stands by, goes on where another was. What can become less is a gauge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.health import Observations, Sample
from aurora_sgl.intervals import accept_length
from aurora_sgl.rollout import status
from aurora_sgl.rollout.alerts import CRITICAL, KINDS, WARNING
from aurora_sgl.scheduler.loop import Scheduler
from aurora_sgl.sequences.held_out import RULES, held_out_counts
from aurora_sgl.sequences.splits import GATE_SHARE
from aurora_sgl.store import queries
from aurora_sgl.store.domains import OTHER
from aurora_sgl.store.models import Evaluation, TrainingRun

#: Accept lengths are those of the last hour.
BACK = timedelta(hours=1)
#: Pairs of version and domain that are told apart.
MOST_PAIRS = 200
STATES = ("waiting", "training", "gate", "trial", "watch", "cooldown", "off")
#: What is counted from zero on, so that the first of its kind is an increase.
EVALUATIONS = ("replay", "live", "trial")
VERDICTS = ("pass", "fail", "inconclusive")
ENDED = ("succeeded", "failed", "skipped")
WATCHED = ("passed", "failed", "ended")
SERVERS = ("converged", "behind", "silent")
#: Seconds of a round: one that finds nothing to do, up to one that waits for locks of others.
ROUND_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


def rounds() -> Observations:
    """Where the durations of rounds are kept."""
    return Observations(ROUND_BOUNDS)


def of_group(s: Session, group_id: int, gate_share: float = GATE_SHARE) -> list[Sample]:
    """What is served, what should be, what learning did, what is lost, what is off."""
    return [
        *_served(s, group_id),
        *_live(s, group_id),
        *_servers(s, group_id),
        *_runs(queries.runs.runs(s, group_id)),
        *_judged(s, group_id, gate_share),
        *_told(s, group_id),
    ]


def _each(
    name: str, kind: str, help: str, values: Mapping[str, float], label: str
) -> Iterator[Sample]:
    for key, value in values.items():
        yield Sample(name, kind, help, value, ((label, key),))


# -- what is served --------------------------------------------------------------------------------


def _served(s: Session, group_id: int) -> Iterator[Sample]:
    since = utc_now() - BACK
    for (version_id, domain), (steps, accepted) in _by_version(s, group_id, since).items():
        labels = (("version", str(version_id)), ("domain", domain))
        yield Sample("aurora_accept_length", "gauge", "accept length, last hour",
                     accept_length(accepted, steps), labels)  # fmt: skip
        yield Sample("aurora_verify_steps", "gauge", "verify steps with drafts, last hour",
                     steps, labels)  # fmt: skip


def _by_version(
    s: Session, group_id: int, since: datetime
) -> dict[tuple[int, str], tuple[int, int]]:
    """(verify steps, accepted) by version and domain: the pairs with the most steps, and the rest
    of each version as one. Clients name domains as they like, and a series stays for ever."""
    rows = queries.accept_lengths.accept_length_by_version(s, group_id, since=since, by_domain=True)
    sums: dict[tuple[int, str], tuple[int, int]] = {}
    for place, row in enumerate(sorted(rows, key=lambda row: -row.verify_steps)):
        key = (row.version_id, row.domain if place < MOST_PAIRS else OTHER)
        steps, accepted = sums.get(key, (0, 0))
        sums[key] = (steps + row.verify_steps, accepted + row.accepted)
    return sums


def _live(s: Session, group_id: int) -> Iterator[Sample]:
    live = queries.aliases.aliases(s, group_id).get("live")
    wanted = queries.aliases.wanted_version(s, group_id)
    yield Sample("aurora_live_version", "gauge", "the version that is live by its last promotion "
                 "or rollback; 0: none yet", live or 0)  # fmt: skip
    yield Sample("aurora_wanted_version", "gauge", "the version that the servers should run: the "
                 "live one, or that of a trial's window",
                 wanted.version_id if wanted else 0)  # fmt: skip
    replayed = _replayed(s, live) if live is not None else None
    if replayed is not None:
        yield Sample("aurora_replayed_accept_length", "gauge", "accept length of the live version "
                     "in the gate's newest replay of it", replayed,
                     (("version", str(live)),))  # fmt: skip


def _replayed(s: Session, version_id: int) -> float | None:
    """By the newest replay, where it was judged itself or another against it."""

    def is_replay(row: Evaluation) -> bool:
        return row.kind == "replay" and not row.domain

    own = next(filter(is_replay, queries.evaluations.evaluations(s, version_id)), None)
    against = queries.evaluations.replays_against(s, version_id)
    if against and (own is None or against[-1].id > own.id):
        length = against[-1].baseline_accept_length
        if length is not None:
            return length
    return own.candidate_accept_length if own is not None else None


def _servers(s: Session, group_id: int) -> Iterator[Sample]:
    name = queries.groups.group(s, group_id).name
    counts = dict.fromkeys(SERVERS, 0)
    for server in status.servers(s.connection().engine, name):
        state = "silent" if server.silent else "converged" if server.converged else "behind"
        counts[state] += 1
    yield from _each("aurora_servers", "gauge", "running servers, by whether they run what they "
                     "should and are heard of", counts, "state")  # fmt: skip
    yield from _each("aurora_drops", "gauge", "records that are lost, by the place where; those "
                     "that could be stored later are no more", queries.drops.drops(s, group_id),
                     "place")  # fmt: skip


# -- learning --------------------------------------------------------------------------------------


def _runs(runs: Sequence[TrainingRun]) -> Iterator[Sample]:
    """``runs``: newest first."""
    ended = [run for run in runs if run.status in ENDED and run.finished_at is not None]
    count, seconds = Counter(run.status for run in ended), dict.fromkeys(ENDED, 0.0)
    last: dict[str, float] = {}
    for run in ended:
        assert run.finished_at is not None
        seconds[run.status] += max(0.0, (run.finished_at - run.started_at).total_seconds())
        last[run.status] = max(last.get(run.status, 0.0), run.finished_at.timestamp())
    yield Sample("aurora_training_running", "gauge", "training runs that go on",
                 sum(run.status == "running" for run in runs))  # fmt: skip
    yield from _each("aurora_training_runs", "counter", "training runs by how they ended",
                     {name: count[name] for name in ENDED}, "status")  # fmt: skip
    yield from _each("aurora_training_run_seconds", "counter", "what training runs took, by how "
                     "they ended", seconds, "status")  # fmt: skip
    yield from _each("aurora_training_last_end_timestamp_seconds", "gauge", "when the last "
                     "training run ended so", last, "status")  # fmt: skip
    yield Sample("aurora_training_failures_in_a_row", "gauge", "training runs that failed since "
                 "the last one that did not", _failures_in_a_row(ended))  # fmt: skip


def _failures_in_a_row(ended: Iterable[TrainingRun]) -> int:
    failed = 0
    for run in ended:
        if run.status == "succeeded":
            break
        failed += run.status == "failed"
    return failed


def _judged(s: Session, group_id: int, gate_share: float) -> Iterator[Sample]:
    counts = {(kind, verdict): 0 for kind in EVALUATIONS for verdict in VERDICTS}
    counts |= queries.evaluations.count_verdicts(s, group_id)
    for (kind, verdict), count in counts.items():
        yield Sample("aurora_verdicts", "counter", "evaluations by kind and verdict", count,
                     (("kind", kind), ("verdict", verdict)))  # fmt: skip
    evidence = held_out_counts(s, group_id, gate_share=gate_share)
    yield from _each("aurora_held_out_requests", "gauge", "held-out requests that can be judged, "
                     "and those that can't by the reason",
                     {"judged": evidence.judged, **evidence.left_out}, "state")  # fmt: skip
    yield from _each("aurora_held_out_judged", "gauge", "held-out requests that can be judged, by "
                     "accept rule", dict.fromkeys(RULES, 0) | evidence.by_rule, "rule")  # fmt: skip
    deployed = Counter(row.action for row in queries.deployments.deployments(s, group_id))
    yield from _each("aurora_deployments", "counter", "promotions and rollbacks",
                     {action: deployed[action] for action in ("promote", "rollback")},
                     "action")  # fmt: skip
    watches = Counter(row.status for row in queries.watches.watches(s, group_id))
    yield from _each("aurora_watches", "counter", "watches over promoted versions by how they "
                     "ended", {name: watches[name] for name in WATCHED}, "status")  # fmt: skip
    yield Sample("aurora_watch_running", "gauge", "1 while a promoted version is watched",
                 float(watches["running"] > 0))  # fmt: skip


# -- what people are told --------------------------------------------------------------------------


def _told(s: Session, group_id: int) -> Iterator[Sample]:
    alerts = {(kind, severity): 0 for kind in KINDS for severity in (CRITICAL, WARNING)}
    alerts |= queries.alerts.count_open(s, group_id)
    for (kind, severity), count in alerts.items():
        yield Sample("aurora_alerts_open", "gauge", "alerts that are not over and that nobody "
                     "acknowledged", count,
                     (("kind", kind), ("severity", severity)))  # fmt: skip
    deliveries = queries.notifications.count_deliveries(s, group_id)
    for (target, state), count in deliveries.items():
        yield Sample("aurora_notifications", "gauge", "notifications that are still kept, by "
                     "receiver and state", count,
                     (("target", target), ("state", state)))  # fmt: skip
    waits = dict.fromkeys(sorted({target for target, _ in deliveries}), 0.0)
    if oldest := queries.notifications.oldest_waiting(s, group_id):
        target, since, _ = oldest
        waits[target] = max(0.0, (utc_now() - since).total_seconds())
    yield from _each("aurora_notifications_oldest_waiting_seconds", "gauge", "age of the oldest "
                     "notification that a receiver did not take; 0: it takes them", waits,
                     "target")  # fmt: skip


# -- of itself -------------------------------------------------------------------------------------


def of_itself(
    scheduler: Scheduler, state: str, ticked: float, took: Observations | None = None
) -> Iterator[Sample]:
    """``ticked``: seconds since the last round that was done; ``took``: how long rounds took."""
    yield Sample("aurora_scheduler_leads", "gauge", "1 while this one leads its group",
                 float(scheduler.hold.held))  # fmt: skip
    yield Sample("aurora_scheduler_round_age_seconds", "gauge", "since the last round", ticked)
    if took is not None:
        yield took.sample("aurora_scheduler_round_seconds", "duration of a round")
    for each in STATES:
        yield Sample("aurora_scheduler_state", "gauge", "1 for what the group's scheduler does",
                     float(each == state), (("state", each),))  # fmt: skip
    yield Sample("aurora_scheduler_new_requests", "gauge", "new requests that may be learnt from",
                 float(scheduler.details.get("new_requests", 0)))  # fmt: skip
    progress = scheduler.progress() or {}
    yield Sample("aurora_training_paused", "gauge", "1 while a run is paused for the servers",
                 float(bool(progress.get("paused"))))  # fmt: skip
    done = progress.get("update", 0) / max(1, progress.get("updates", 1))
    yield Sample("aurora_training_progress", "gauge", "share of the run's updates", float(done))
