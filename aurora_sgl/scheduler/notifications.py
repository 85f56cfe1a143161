"""What people must know, written down once an event: the scheduler that leads looks every few
seconds, and ``courier`` sends it.

Events are rows that others wrote (deployments, verdicts, failed watches and runs, falls of the
accept length), and alerts that begin or are over. Each has a key, so that looking again, another
leader or a restart writes nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import NotifySettings
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout import alerts, status
from aurora_sgl.store import queries
from aurora_sgl.store.models import AlertRecord, Deployment, Drift, Evaluation, TrainingRun, Watch

INFO = "info"
#: Kinds that are told from the rows that they are, with the alert of that name or without one.
EVENTS = {
    "promotion": "another version went live",
    "rollback": "an older version went live again",
    "verdict": "the gate or a trial judged a version",
    "watch_failed": alerts.KINDS["watch_failed"],
    "drift": alerts.KINDS["drift"],
    "training_failed": "a training run failed",
}
KINDS = {**alerts.KINDS, **EVENTS, "test": "somebody tries whether notifications arrive"}
#: How far back rows are looked at again: longer than a store or a scheduler is away.
LOOK_BACK = timedelta(days=2)
#: Letters of a text that are sent.
LONGEST = 2000
WEBHOOK, SLACK = "webhook", "slack"

_VERDICTS = {"pass": "passed", "fail": "failed", "inconclusive": "is not told apart"}


@dataclass(frozen=True)
class Event:
    """One thing that people are told. ``key`` names it within its group."""

    key: str
    kind: str
    severity: str  # critical, warning or info
    title: str
    text: str
    happened_at: datetime
    details: dict[str, Any] = field(default_factory=dict)


def targets(settings: NotifySettings) -> tuple[str, ...]:
    """Receivers that the settings name."""
    chosen = {WEBHOOK: settings.webhook, SLACK: settings.slack}
    return tuple(name for name, address in chosen.items() if address.get_secret_value())


def kinds(settings: NotifySettings) -> frozenset[str]:
    """Kinds that are sent. Raises ``AuroraError`` for a name that is none."""
    names = {name.strip() for name in settings.kinds.split(",")} - {""}
    if unknown := sorted(names - KINDS.keys()):
        raise AuroraError(
            f"AURORA_NOTIFY_KINDS: there is no kind {unknown[0]!r}; there is: {', '.join(KINDS)}"
        )
    return frozenset(names or KINDS)


def look(engine: Engine, group: str, settings: NotifySettings, now: datetime | None = None) -> int:
    """Write what happened since the last look; how many events were new."""
    moment = now or utc_now()
    problems = alerts.alerts(engine, status.look(engine, group))
    with store.session(engine) as s:
        group_id = queries.groups.group_by_name(s, group).id
        back = min(LOOK_BACK, timedelta(days=settings.keep_days) / 2)  # never what was forgotten
        since = max(queries.notifications.begins_at(s, group_id), moment - back)
        changes = alerts.record(s, group_id, problems, moment)
        written = queries.notifications.written_since(s, group_id, since)
        events = [*_events(s, group_id, since), *_of_alerts(changes)]
        new = [event for event in events if event.key not in written]
        return _write(s, group_id, new, settings)


def _write(s: Session, group_id: int, events: Sequence[Event], settings: NotifySettings) -> int:
    receivers, wanted = targets(settings), kinds(settings)
    queries.notifications.give_up_unnamed(s, group_id, receivers)
    written = 0
    for event in sorted(events, key=lambda one: one.happened_at):
        written += queries.notifications.add_notification(
            s,
            group_id,
            event_key=event.key,
            kind=event.kind,
            severity=event.severity,
            title=event.title,
            text=_short(event.text),
            happened_at=event.happened_at,
            details=event.details,
            targets=receivers if event.kind in wanted else (),
        )
    return written


def _short(text: str) -> str:
    """At most so much of a text as a chat shows: an error of a training run may be pages."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def forget(engine: Engine, group: str, settings: NotifySettings) -> int:
    """Delete notifications and ended alerts that are older than they are kept; how many."""
    before = utc_now() - timedelta(days=settings.keep_days)
    with store.session(engine) as s:
        group_id = queries.groups.group_by_name(s, group).id
        gone = queries.notifications.forget_notifications(s, group_id, before)
        return gone + queries.alerts.forget_alerts(s, group_id, before)


def _events(s: Session, group_id: int, since: datetime) -> Iterator[Event]:
    yield from map(_of_deployment, queries.deployments.deployments(s, group_id, since=since))
    yield from map(_of_verdict, queries.evaluations.verdicts(s, group_id, since=since))
    yield from map(_of_watch, queries.watches.failed_watches(s, group_id, since))
    yield from map(_of_run, queries.runs.failed_runs(s, group_id, since))
    yield from map(_of_drift, queries.drifts.drifts(s, group_id, since=since))


def _of_deployment(row: Deployment) -> Event:
    before = "no version" if row.previous_version_id is None else f"{row.previous_version_id}"
    back = row.action == "rollback"
    title = f"Version {row.version_id} is live" + (" again" if back else "")
    return Event(
        f"deployment/{row.generation}",
        "rollback" if back else "promotion",
        alerts.WARNING if back else INFO,
        title,
        f"{title}, by {row.actor}: {row.reason}. Before: version {before}.",
        row.created_at,
        {
            "generation": row.generation,
            "version_id": row.version_id,
            "previous_version_id": row.previous_version_id,
            "actor": row.actor,
            "reason": row.reason,
        },
    )


def _of_verdict(row: Evaluation) -> Event:
    judged = "A trial" if row.kind == "trial" else "The gate" if row.kind == "replay" else row.kind
    title = f"Version {row.candidate_id} {_VERDICTS[row.verdict]} ({judged.lower()})"
    lengths = ""
    if row.candidate_accept_length is not None and row.baseline_accept_length is not None:
        lengths = (
            f" Accept length {row.candidate_accept_length:.3f} against "
            f"{row.baseline_accept_length:.3f} of version {row.baseline_id}, on {row.requests} "
            "requests."
        )
    reason = str(row.details.get("reason", ""))
    return Event(
        f"evaluation/{row.id}",
        "verdict",
        INFO,
        title,
        f"{title}: {reason}.{lengths}",
        row.created_at,
        {
            "evaluation_id": row.id,
            "kind": row.kind,
            "verdict": row.verdict,
            "candidate_id": row.candidate_id,
            "baseline_id": row.baseline_id,
            "candidate_accept_length": row.candidate_accept_length,
            "baseline_accept_length": row.baseline_accept_length,
            "ci_low": row.ci_low,
            "ci_high": row.ci_high,
            "requests": row.requests,
            "reason": reason,
        },
    )


def _of_watch(row: Watch) -> Event:
    title = f"The watch over version {row.version_id} failed"
    return Event(
        f"watch/{row.id}",
        "watch_failed",
        alerts.CRITICAL,
        title,
        f"{title}: {row.reason}.",
        row.finished_at or row.started_at,
        {
            "watch_id": row.id,
            "version_id": row.version_id,
            "baseline_id": row.baseline_id,
            "reason": row.reason,
        },
    )


def _of_run(row: TrainingRun) -> Event:
    title = f"Training run {row.id} failed"
    return Event(
        f"run/{row.id}",
        "training_failed",
        alerts.WARNING,
        title,
        f"{title}: {row.error}.",
        row.finished_at or row.started_at,
        {"run_id": row.id, "trigger": row.trigger, "error": row.error},
    )


def _of_drift(row: Drift) -> Event:
    title = f"The accept length in {row.domain} fell"
    return Event(
        f"drift/{row.id}",
        "drift",
        alerts.WARNING,
        title,
        f"{title} from {row.accept_length_before:.2f} to {row.accept_length_after:.2f}, with "
        f"version {row.version_id} live.",
        row.detected_at,
        {
            "drift_id": row.id,
            "version_id": row.version_id,
            "domain": row.domain,
            "accept_length_before": row.accept_length_before,
            "accept_length_after": row.accept_length_after,
        },
    )


def _of_alerts(changes: alerts.AlertChanges) -> Iterator[Event]:
    """Of those that no row of another table is."""
    for row in changes.begun:
        if row.kind not in EVENTS:
            yield _of_alert(row, "began", row.severity, row.began_at, row.text)
    for row in changes.ended:
        if row.kind not in EVENTS:
            text = f"It is over. It was: {row.text}"
            yield _of_alert(row, "ended", INFO, row.ended_at or row.seen_at, text)


def _of_alert(row: AlertRecord, state: str, severity: str, moment: datetime, text: str) -> Event:
    meaning = alerts.KINDS[row.kind]
    title = f"Over: {meaning}" if state == "ended" else f"{meaning[:1].upper()}{meaning[1:]}"
    details = {
        "alert_id": row.id,
        "state": state,
        "began_at": row.began_at.isoformat(),
        "acknowledged_by": row.acknowledged_by,
    }
    return Event(f"alert/{row.id}/{state}", row.kind, severity, title, text, moment, details)
