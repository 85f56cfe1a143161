"""What the scheduler tells Prometheus: of itself, and of its group as the store has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.health import Sample
from aurora_sgl.intervals import accept_length
from aurora_sgl.scheduler.loop import Scheduler
from aurora_sgl.sequences.held_out import held_out_counts
from aurora_sgl.sequences.splits import GATE_SHARE
from aurora_sgl.store import queries
from aurora_sgl.store.domains import OTHER

#: Accept lengths are those of the last hour.
BACK = timedelta(hours=1)
#: Pairs of version and domain that are told apart.
MOST_PAIRS = 200
STATES = ("waiting", "training", "gate", "trial", "watch", "cooldown", "off")


def of_group(s: Session, group_id: int, gate_share: float = GATE_SHARE) -> list[Sample]:
    """Accept length and verify steps by version and domain, runs, verdicts, evidence, drops."""
    samples: list[Sample] = []
    since = utc_now() - BACK
    for (version_id, domain), (steps, accepted) in _served(s, group_id, since).items():
        labels = (("version", str(version_id)), ("domain", domain))
        samples += [
            Sample("aurora_accept_length", "gauge", "accept length, last hour",
                   accept_length(accepted, steps), labels),
            Sample("aurora_verify_steps", "gauge", "verify steps with drafts, last hour",
                   steps, labels),
        ]  # fmt: skip
    runs = Counter(run.status for run in queries.runs.runs(s, group_id))
    for status in ("running", "succeeded", "failed", "skipped"):
        samples.append(Sample("aurora_training_runs", "gauge", "training runs by how they ended",
                              runs[status], (("status", status),)))  # fmt: skip
    for (kind, verdict), count in queries.evaluations.count_verdicts(s, group_id).items():
        samples.append(Sample("aurora_verdicts", "gauge", "evaluations by kind and verdict", count,
                              (("kind", kind), ("verdict", verdict))))  # fmt: skip
    evidence = held_out_counts(s, group_id, gate_share=gate_share)
    for state, count in {"judged": evidence.judged, **evidence.left_out}.items():
        samples.append(Sample("aurora_held_out_requests", "gauge", "held-out requests that can be "
                              "judged, and those that can't by the reason", count,
                              (("state", state),)))  # fmt: skip
    for rule, count in evidence.by_rule.items():
        samples.append(Sample("aurora_held_out_judged", "gauge", "held-out requests that can be "
                              "judged, by accept rule", count, (("rule", rule),)))  # fmt: skip
    for place, count in queries.drops.drops(s, group_id).items():
        samples.append(Sample("aurora_drops", "counter", "records lost, by the place where", count,
                              (("place", place),)))  # fmt: skip
    deployed = Counter(row.action for row in queries.deployments.deployments(s, group_id))
    for action in ("promote", "rollback"):
        samples.append(Sample("aurora_deployments", "counter", "promotions and rollbacks",
                              deployed[action], (("action", action),)))  # fmt: skip
    live = queries.aliases.aliases(s, group_id).get("live")
    samples.append(Sample("aurora_live_version", "gauge", "the version that should be live",
                          live or 0))  # fmt: skip
    return samples


def _served(s: Session, group_id: int, since: datetime) -> dict[tuple[int, str], tuple[int, int]]:
    """(verify steps, accepted) by version and domain: the pairs with the most steps, and the rest
    of each version as one. Clients name domains as they like, and a series stays for ever."""
    rows = queries.accept_lengths.accept_length_by_version(s, group_id, since=since, by_domain=True)
    sums: dict[tuple[int, str], tuple[int, int]] = {}
    for place, row in enumerate(sorted(rows, key=lambda row: -row.verify_steps)):
        key = (row.version_id, row.domain if place < MOST_PAIRS else OTHER)
        steps, accepted = sums.get(key, (0, 0))
        sums[key] = (steps + row.verify_steps, accepted + row.accepted)
    return sums


def of_itself(scheduler: Scheduler, state: str, ticked: float) -> Iterator[Sample]:
    """``ticked``: seconds since the last round that was done."""
    yield Sample("aurora_scheduler_leads", "gauge", "1 while this one leads its group",
                 float(scheduler.hold.held))  # fmt: skip
    yield Sample("aurora_scheduler_round_age_seconds", "gauge", "since the last round", ticked)
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
