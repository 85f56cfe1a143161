"""Serving comes first: how fast training may go while the servers are as busy as they say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aurora_sgl.config import SchedulerSettings
from aurora_sgl.scheduler.elapsed import Elapsed
from aurora_sgl.store.liveness import STALE_SECONDS
from aurora_sgl.store.models import Server

FULL, HALF, NONE = "full", "half", "none"


@dataclass(frozen=True)
class ServingLoad:
    """``pace``: full, half (every second moment) or none. ``reason`` is empty at full pace."""

    pace: str
    reason: str = ""


def load_of(servers: Iterable[Server], rules: SchedulerSettings, elapsed: Elapsed) -> ServingLoad:
    """From the counters that each running server sends along with its Hello."""
    busy = ServingLoad(FULL)
    for server in servers:
        if elapsed.since(server.last_seen_at) > STALE_SECONDS:
            continue
        queue = float(server.counters.get("queue", 0.0))
        # of the last steps, however long ago they were: a server without requests is not slow
        running = server.counters.get("running_requests", 0.0)
        step_ms = float(server.counters.get("step_ms", 0.0)) if running else 0.0
        if rules.pause_queue and queue >= rules.pause_queue:
            reason = f"{queue:.0f} requests wait at {server.name} (limit {rules.pause_queue:.0f})"
            return ServingLoad(NONE, reason)
        if rules.pause_step_ms and step_ms >= rules.pause_step_ms:
            limit = f"(limit {rules.pause_step_ms:.0f})"
            return ServingLoad(NONE, f"a step of {server.name} takes {step_ms:.0f} ms {limit}")
        if rules.slow_queue and queue >= rules.slow_queue:
            busy = ServingLoad(HALF, f"{queue:.0f} requests wait at {server.name}")
    return busy
