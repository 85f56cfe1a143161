"""What an operator should look at now, from what the store says: for the page, the scheduler's
notifications, the API and the metrics alike.

An alert is a state with a key that stays the same while it lasts. Its history, and who took notice
of it, is in the store's table ``alert``, which the scheduler that leads keeps (see :func:`record`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import SchedulerSettings
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout import status
from aurora_sgl.store import queries
from aurora_sgl.store.domains import OTHER, day_of, limit_reached
from aurora_sgl.store.models import AlertRecord
from aurora_sgl.trace_room import ADVICE

CRITICAL, WARNING = "critical", "warning"
#: Every kind of alert, and what it means.
KINDS = {
    "server_silent": "a server is not heard of",
    "server_behind": "a server does not run the version that should be live",
    "no_server": "no server of the group is running",
    "server_notice": "a server says that something of it is wrong or switched off",
    "watch_failed": "a promoted version was rolled back by its watch in the last day",
    "watch_doubt": "windows of a running watch were not good",
    "stage_failed": "a version was taken back from the servers that ran it first in the last day",
    "stage_waiting": "a version passed on the servers that ran it first, and waits to go on",
    "drift": "the accept length of the live version fell in the last day",
    "records_lost": "records were lost in the last day",
    "traces_lost": "traces were lost in the last day",
    "trace_room": "the traces' budget holds fewer requests than training waits for",
    "too_many_domains": "clients named more domains today than are told apart",
    "switch_off": "a kill switch is off",
    "training_failed": "the last training run failed",
    "scheduler_silent": "the scheduler is not heard of",
    "notifications_late": "notifications do not reach their receiver",
}
#: What changes in a notice while it means the same.
_NUMBER = re.compile(r"\d+")
#: How long a thing of the past is shown.
RECENT = timedelta(hours=24)
#: Seconds for which an alert must be away before it is over: one that comes and goes is one.
OVER_SECONDS = 60.0
#: Seconds for which a notification waits before that is an alert of its own.
LATE_SECONDS = 120.0
#: Where records are lost, in words.
PLACES = {
    "engine": "at the engine, whose buffer was full",
    "transport": "on the way to the sidecar",
    "spool": "at the spool, which was full",
    "rejected": "refused by the store (aurora-sgl db refused)",
    "store": "forgotten by the store",
}


@dataclass(frozen=True)
class Alert:
    """``head`` and ``tail``: the sentence before and behind a moment, which pages say in their own
    way; without one ``head`` is all of it."""

    kind: str
    subject: str
    severity: str
    head: str
    when: datetime | None = None
    tail: str = ""

    @property
    def key(self) -> str:
        """Stays the same while the alert lasts."""
        return f"{self.kind}/{self.subject}" if self.subject else self.kind

    @property
    def text(self) -> str:
        moment = f"at {self.when:%Y-%m-%d %H:%M} UTC" if self.when is not None else ""
        return f"{self.head}{moment}{self.tail}"

    @property
    def severe(self) -> bool:
        return self.severity == CRITICAL


@dataclass(frozen=True)
class AlertChanges:
    """What one look changed."""

    begun: Sequence[AlertRecord]
    ended: Sequence[AlertRecord]


def alerts(engine: Engine, look: status.GroupStatus) -> list[Alert]:
    """The worst first."""
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, look.group).id
        problems = [*_servers(look), *_notices(look), *_watch(look), *_stage(look)]
        problems += [
            *_drift(s, group_id),
            *_drops(s, group_id),
            *_learning(s, group_id, look),
            *_traces(s, group_id),
        ]
        problems += [*_domains(s, group_id), *_late(s, group_id)]
    return sorted(problems, key=lambda alert: not alert.severe)


def record(
    s: Session, group_id: int, problems: Sequence[Alert], now: datetime | None = None
) -> AlertChanges:
    """Write down what began and what is over. Call it in the transaction that tells of it."""
    moment = now or utc_now()
    rows = {row.key: row for row in queries.alerts.open_alerts(s, group_id)}
    begun, still = [], []
    for alert in {problem.key: problem for problem in problems}.values():
        row = rows.pop(alert.key, None)
        if row is None:
            begun.append(
                queries.alerts.begin_alert(
                    s, group_id, key=alert.key, kind=alert.kind, severity=alert.severity,
                    text=alert.text, now=moment,
                )
            )  # fmt: skip
            continue
        still.append(row.id)
        row.text, row.severity = alert.text, alert.severity
    queries.alerts.see_alerts(s, still, moment)
    over = timedelta(seconds=OVER_SECONDS)
    ended = [row for row in rows.values() if moment - row.seen_at >= over]
    for row in ended:
        row.ended_at = moment
    s.flush()
    return AlertChanges(begun, ended)


def acknowledge(
    engine: Engine, group: str, alert_id: int, *, actor: str, note: str = ""
) -> AlertRecord:
    """Say who takes care of an alert. It goes on until what it says is over. The audit has who and
    when; what is off stays in the alert alone, from which a purge can take a name.

    Raises ``AuroraError`` where there is no such alert, it was acknowledged before, or nobody acts.
    """
    if not actor.strip():
        raise AuroraError(f"acknowledging alert {alert_id} needs a name: who does this?")
    with store.session(engine) as s:
        group_id = queries.groups.group_by_name(s, group).id
        row = queries.alerts.acknowledge(
            s, group_id, alert_id, actor=actor.strip(), note=note.strip(), now=utc_now()
        )
        queries.audit.add_audit(
            s, group_id, actor=actor, action="acknowledge", subject=f"alert {alert_id}",
            reason=note.strip() or "taken without a note",
            after={"kind": row.kind, "severity": row.severity},
        )  # fmt: skip
        return row


def history(engine: Engine, group: str, *, limit: int | None = None) -> Sequence[AlertRecord]:
    """Alerts of a group as the scheduler wrote them down, newest first."""
    with store.session(engine, write=False) as s:
        return queries.alerts.alerts(s, queries.groups.group_by_name(s, group).id, limit=limit)


def _version(version_id: int | None) -> str:
    return "no version" if version_id is None else f"version {version_id}"


def _servers(look: status.GroupStatus) -> Iterator[Alert]:
    for server in look.servers:
        if server.silent:
            tail = ": it is down, or its sidecar does not reach the store."
            head = f"Server {server.name} was last heard of "
            yield Alert("server_silent", server.name, CRITICAL, head, server.last_seen_at, tail)
        elif not server.converged:
            severity = WARNING if "on its way" in server.reason else CRITICAL
            text = (
                f"Server {server.name} should run {_version(server.wanted_version_id)} and runs "
                f"{_version(server.live_version_id)}: {server.reason}."
            )
            yield Alert("server_behind", server.name, severity, text)
    if not look.servers:
        text = "No server of this group is running; nothing is served."
        yield Alert("no_server", "", WARNING, text)


def _notices(look: status.GroupStatus) -> Iterator[Alert]:
    """What servers say about themselves."""
    for server in look.servers:
        for notice in server.notices:
            subject = f"{server.name}/{_NUMBER.sub('#', notice)}"[:200]
            yield Alert("server_notice", subject, WARNING, f"Server {server.name}: {notice}")


def _watch(look: status.GroupStatus) -> Iterator[Alert]:
    if look.watch is None:
        return
    watch = look.watch.watch
    if watch.status == "failed" and watch.finished_at and utc_now() - watch.finished_at < RECENT:
        head = f"The watch over version {watch.version_id} failed "
        tail = f" and rolled it back: {watch.reason}."
        yield Alert("watch_failed", str(watch.id), CRITICAL, head, watch.finished_at, tail)
    bad = [window for window in look.watch.windows if window.verdict != "pass"]
    if watch.status == "running" and bad:
        text = (
            f"Version {watch.version_id} is being watched, and {len(bad)} of "
            f"{len(look.watch.windows)} windows were not good: {bad[-1].reason}."
        )
        yield Alert("watch_doubt", str(watch.id), WARNING, text)


def _stage(look: status.GroupStatus) -> Iterator[Alert]:
    if look.stage is None:
        return
    one = look.stage.stage
    where = ", ".join(one.servers)
    if one.status == "failed" and one.finished_at and utc_now() - one.finished_at < RECENT:
        head = f"Version {one.version_id} was taken back from {where} "
        tail = f": {one.outcome}. The other servers never ran it."
        yield Alert("stage_failed", str(one.id), WARNING, head, one.finished_at, tail)
    if one.status == "passed":
        text = f"Version {one.version_id} passed on {where}: {look.stage.sentence}."
        yield Alert("stage_waiting", str(one.id), WARNING, text)


def _drift(s: Session, group_id: int) -> Iterator[Alert]:
    for row in queries.drifts.drifts(s, group_id, limit=5):
        if utc_now() - row.detected_at < RECENT:
            head = (
                f"The accept length of version {row.version_id} in {row.domain} fell from "
                f"{row.accept_length_before:.2f} to {row.accept_length_after:.2f} "
            )
            yield Alert("drift", str(row.id), WARNING, head, row.detected_at, ".")


def _drops(s: Session, group_id: int) -> Iterator[Alert]:
    """Of the last day: an alert ends when nothing more is lost."""
    lost = queries.drops.drops(s, group_id, since=utc_now() - RECENT)
    traces = lost.pop("trace", 0)
    if lost:
        losses = ", ".join(f"{lost[place]:,} {PLACES.get(place, place)}" for place in sorted(lost))
        text = f"Records were lost in the last day: {losses} (since the servers started)."
        yield Alert("records_lost", "", WARNING, f"{text} Requests were not.")
    if traces:
        text = f"Traces were lost in the last day: {traces:,} since the servers started."
        yield Alert("traces_lost", "", WARNING, f"{text} Requests were not.")


def _traces(s: Session, group_id: int) -> Iterator[Alert]:
    room = queries.servers.trace_room(s, group_id)
    problem = room.too_small_for(SchedulerSettings().requests) if room is not None else ""
    if problem:
        text = f"{problem[:1].upper()}{problem[1:]}: {ADVICE}."
        yield Alert("trace_room", "", WARNING, text)


def _domains(s: Session, group_id: int) -> Iterator[Alert]:
    most = limit_reached(s, group_id, day_of(utc_now()))
    if most is not None:
        text = (
            f"Clients named more than {most} domains today (UTC); requests of the rest count as "
            f'"{OTHER}" (AURORA_MOST_DOMAINS).'
        )
        yield Alert("too_many_domains", "", WARNING, text)


def _learning(s: Session, group_id: int, look: status.GroupStatus) -> Iterator[Alert]:
    for switch in look.switches:
        if switch.on:
            continue
        head = f"{switch.name.replace('_', ' ').capitalize()} is switched off"
        if switch.actor:
            yield Alert("switch_off", switch.name, WARNING, f"{head} by {switch.actor} ",
                        switch.updated_at, f": {switch.reason}.")  # fmt: skip
        else:
            yield Alert("switch_off", switch.name, WARNING, f"{head}.")
    for run in queries.runs.runs(s, group_id, limit=1):
        if run.status == "failed":
            text = f"The last training run ({run.id}) failed: {run.error}."
            yield Alert("training_failed", str(run.id), WARNING, text)
    scheduler = look.scheduler
    if not scheduler.alive and scheduler.updated_at is not None and scheduler.state != "stopped":
        head = "The scheduler was last heard of "
        yield Alert("scheduler_silent", "", WARNING, head, scheduler.updated_at, ".")


def _late(s: Session, group_id: int) -> Iterator[Alert]:
    waiting = queries.notifications.oldest_waiting(s, group_id)
    if waiting is None:
        return
    target, since, error = waiting
    if utc_now() - since >= timedelta(seconds=LATE_SECONDS):
        head = f"Notifications for {target} wait, the oldest since "
        yield Alert("notifications_late", target, WARNING, head, since, f": {error}.")
