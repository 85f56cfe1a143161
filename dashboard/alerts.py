"""What an operator should look at, from what the store and rollout say."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from aurora_sgl.config import SchedulerSettings
from aurora_sgl.rollout import status
from aurora_sgl.store.domains import OTHER
from aurora_sgl.trace_room import ADVICE

from . import data, words
from .context import Group, now

#: How long a thing of the past is shown.
RECENT = timedelta(hours=24)
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
    text: str
    severe: bool


def alerts(group: Group, look: status.GroupStatus) -> list[Alert]:
    """The worst first."""
    problems = [*_servers(look), *_notices(look), *_watch(look), *_drift(group), *_drops(group)]
    problems += [*_learning(group, look), *_traces(group), *_domains(group)]
    return sorted(problems, key=lambda alert: not alert.severe)


def _servers(look: status.GroupStatus) -> list[Alert]:
    problems = []
    for server in look.servers:
        if server.silent:
            text = (
                f"Server {server.name} was last heard of {words.ago(server.last_seen_at)}: it is "
                "down, or its sidecar does not reach the store."
            )
            problems.append(Alert(text, True))
        elif not server.converged:
            severe = "on its way" not in server.reason
            problems.append(
                Alert(
                    f"Server {server.name} should run {words.version(server.wanted_version_id)} "
                    f"and runs {words.version(server.live_version_id)}: {server.reason}.",
                    severe,
                )
            )
    if not look.servers:
        problems.append(Alert("No server of this group is running; nothing is served.", False))
    return problems


def _notices(look: status.GroupStatus) -> list[Alert]:
    """What servers say about themselves."""
    return [
        Alert(f"Server {server.name}: {notice}", False)
        for server in look.servers
        for notice in server.notices
    ]


def _watch(look: status.GroupStatus) -> list[Alert]:
    if look.watch is None:
        return []
    watch = look.watch.watch
    if watch.status == "failed" and watch.finished_at and now() - watch.finished_at < RECENT:
        return [
            Alert(
                f"The watch over version {watch.version_id} failed {words.ago(watch.finished_at)} "
                f"and rolled it back: {watch.reason}.",
                True,
            )
        ]
    bad = [window for window in look.watch.windows if window.verdict != "pass"]
    if watch.status == "running" and bad:
        return [
            Alert(
                f"Version {watch.version_id} is being watched, and {len(bad)} of "
                f"{len(look.watch.windows)} windows were not good: {bad[-1].reason}.",
                False,
            )
        ]
    return []


def _drift(group: Group) -> list[Alert]:
    return [
        Alert(
            f"The accept length of version {row.version_id} in {row.domain} fell from "
            f"{row.accept_length_before:.2f} to {row.accept_length_after:.2f} "
            f"{words.ago(row.detected_at)}.",
            False,
        )
        for row in status.drifts(group.engine, group.name, limit=5)
        if now() - row.detected_at < RECENT
    ]


def _drops(group: Group) -> list[Alert]:
    """Of the last day: an alert ends when nothing more is lost."""
    lost = data.drops(group, now() - RECENT)
    traces = lost.pop("trace", 0)
    problems = []
    if lost:
        losses = ", ".join(f"{lost[place]:,} {PLACES.get(place, place)}" for place in sorted(lost))
        text = f"Records were lost in the last day: {losses} (since the servers started)."
        problems.append(Alert(f"{text} Requests were not.", False))
    if traces:
        text = f"Traces were lost in the last day: {traces:,} since the servers started."
        problems.append(Alert(f"{text} Requests were not.", False))
    return problems


def _traces(group: Group) -> list[Alert]:
    room = data.trace_room(group)
    problem = room.too_small_for(SchedulerSettings().requests) if room is not None else ""
    return [Alert(f"{problem[:1].upper()}{problem[1:]}: {ADVICE}.", False)] if problem else []


def _domains(group: Group) -> list[Alert]:
    most = data.most_domains(group)
    if most is None:
        return []
    text = (
        f"Clients named more than {most} domains today (UTC); requests of the rest count as "
        f'"{OTHER}" (AURORA_MOST_DOMAINS).'
    )
    return [Alert(text, False)]


def _learning(group: Group, look: status.GroupStatus) -> list[Alert]:
    problems = [
        Alert(
            f"{switch.name.replace('_', ' ').capitalize()} is switched off"
            + (f" by {switch.actor} {words.ago(switch.updated_at)}: {switch.reason}."
               if switch.actor else "."),
            False,
        )
        for switch in look.switches
        if not switch.on
    ]  # fmt: skip
    last = [run for run in data.runs(group, 1) if run.status == "failed"]
    if last:
        problems.append(
            Alert(f"The last training run ({last[0].id}) failed: {last[0].error}.", False)
        )
    scheduler = look.scheduler
    if not scheduler.alive and scheduler.updated_at is not None and scheduler.state != "stopped":
        problems.append(
            Alert(f"The scheduler was last heard of {words.ago(scheduler.updated_at)}.", False)
        )
    return problems
