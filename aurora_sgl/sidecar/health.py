"""What the sidecar's ``/health`` and ``/metrics`` say."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from aurora_sgl.atomic import replace_file
from aurora_sgl.health import HealthServer, Sample, histogram
from aurora_sgl.intervals import accept_length
from aurora_sgl.sidecar.endpoint import HEALTH_FILE
from aurora_sgl.sidecar.served import MOST_POSITIONS, PositionCounts, Sums, SwapTimes
from aurora_sgl.step_cost import StepCost, tree_shares

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """What the sidecar knows of itself and its server at one moment."""

    ready: bool
    reason: str  # why not ready; empty when ready
    live_version_id: int
    live_sha256: str
    phase: str
    speculation_share: float
    counters: dict[str, float]  # monotonic
    gauges: dict[str, float]
    lost: dict[str, float] = field(default_factory=dict)  # by place
    served: dict[tuple[int, str], Sums] = field(default_factory=dict)  # by version and domain
    notices: dict[str, str] = field(default_factory=dict)  # see wire.Hello
    positions: dict[int, PositionCounts] = field(default_factory=dict)  # by version
    swaps: SwapTimes = field(default_factory=SwapTimes)
    engine: Mapping[str, float] = field(default_factory=dict)  # see ``wire.Hello.counters``
    oldest_unstored_seconds: float = 0.0  # age of the oldest record that the store has not


def health(now: Status) -> dict[str, Any]:
    names = ("ready", "reason", "live_version_id", "live_sha256", "phase", "notices")
    return {name: getattr(now, name) for name in names} | {
        "oldest_unstored_seconds": round(now.oldest_unstored_seconds, 1),
        "lost": {place: int(count) for place, count in now.lost.items() if count},
    }


_PREFIX = "aurora_sidecar_"

#: What each gauge and counter of :class:`Status` is.
HELP = {
    "ready": "1 while the sidecar is ready, see /health",
    "live_version": "the version that the server runs; 0 while nobody knows",
    "wanted_version": "the version that the server should run; 0 while nothing is live",
    "speculation_share": "share of the verify steps that may carry drafts",
    "oldest_unstored_seconds": "age of the oldest record that the store has not",
    "spool_bytes": "the spool on the disk",
    "spool_kept_bytes": "the part of the spool that the store has already",
    "spool_limit_bytes": "the most that the spool may take (AURORA_SPOOL_BYTES)",
    "spool_memory_bytes": "records that wait in memory past a spool that is full",
    "disk_bytes": "the file system that the spool is on",
    "disk_free_bytes": "what is free there",
    "traces_open": "traces of requests that still run",
    "trace_memory_bytes": "memory that these traces take",
    "last_swap_stall_seconds": "longest gap between two tokens of a stream at the last swap",
    "longest_swap_stall_seconds": "the same at any swap since the sidecar started",
    "envelopes": "messages from the server",
    "verify_steps": "verify steps that went into the store",
    "records": "records that went into the store",
    "records_set_aside": "records that the store refused and that lie in refused.jsonl",
    "records_refused_unkept": "records that the store refused and refused.jsonl had no room for",
    "spool_damaged_places": "places of the spool that could not be read",
    "spool_damaged_bytes": "bytes of the spool that could not be read",
    "store_rewinds": "how often the store had forgotten what it had, as after a failover",
    "traces_written": "traces of requests that were written",
    "swaps_applied": "versions that went live in the server",
    "swaps_refused": "versions that the server refused",
}


class _EngineMetric(NamedTuple):
    """How a counter of the engine's heartbeat is told."""

    name: str
    kind: str
    help: str
    unit: float = 1.0  # what one of it is in the metric


#: By the heartbeat's name.
_ENGINE = {
    "running_requests": _EngineMetric(
        "running_requests", "gauge", "requests that run in the server"
    ),
    "queue": _EngineMetric("queued_requests", "gauge", "requests that wait for the server"),
    "step_ms": _EngineMetric(
        "step_seconds", "gauge", "median duration of the last verify steps", 1e-3
    ),
    "failures": _EngineMetric("failures", "counter", "failures of our code in the server"),
    "parts_down": _EngineMetric(
        "parts_down", "gauge", "parts of ours that switched themselves off"
    ),
    "dropped_odd": _EngineMetric(
        "odd_records", "counter", "records that could not be encoded or sent"
    ),
    "unstamped": _EngineMetric("unstamped_requests", "counter", "requests without our labels"),
    "unreadable_consent": _EngineMetric(
        "unreadable_consents", "counter", "requests whose consent could not be read"
    ),
    "traces_admitted": _EngineMetric("traces_admitted", "counter", "requests chosen to be traced"),
    "traces_refused": _EngineMetric(
        "traces_refused", "counter", "requests that no budget had room for"
    ),
    "dropped_traces": _EngineMetric("traces_dropped", "counter", "traces that the server gave up"),
    "trace_bytes_reserved": _EngineMetric(
        "trace_reserved_bytes", "gauge", "reserved for traces that are not finished"
    ),
    "trace_bytes_held": _EngineMetric("trace_held_bytes", "gauge", "traces in the server's memory"),
    "capture_scale": _EngineMetric(
        "capture_scale",
        "gauge",
        "share of the chosen requests that the traces' budget lets through",
    ),
}

#: Steps by what they carried, by the heartbeat's name.
_STEPS = {"plain_steps": "plain", "speculative_steps": "drafts"}

#: Drafts accepted in a step: each by itself, then what few drafters reach.
_ACCEPTED = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, MOST_POSITIONS - 1)


def samples(now: Status) -> Iterator[Sample]:
    gauges = {
        **now.gauges,
        "ready": float(now.ready),
        "live_version": now.live_version_id,
        "speculation_share": now.speculation_share,
        "oldest_unstored_seconds": now.oldest_unstored_seconds,
    }
    for kind, values in (("gauge", gauges), ("counter", now.counters)):
        for name, value in values.items():
            help = HELP.get(name, name.replace("_", " "))
            yield Sample(f"{_PREFIX}{name}", kind, help, value)
    for place, value in now.lost.items():
        yield Sample(f"{_PREFIX}lost", "counter",
                     "records lost, by the place where (trace: traces; malformed: messages)", value,
                     (("place", place),))  # fmt: skip
    for code in sorted(now.notices):
        yield Sample(f"{_PREFIX}notice", "gauge",
                     "1 for each thing that is wrong or switched off in the server", 1.0,
                     (("code", code),))  # fmt: skip
    yield from _served(now)
    yield from _swaps(now.swaps)
    yield from _engine(now.engine)
    yield from _costs(StepCost.of(now.engine))
    yield from _trees(now.engine)


def _served(now: Status) -> Iterator[Sample]:
    for (version, domain), sums in sorted(now.served.items()):
        labels = (("version", str(version)), ("domain", domain))
        length = accept_length(sums.accepted, sums.verify_steps)
        yield Sample(f"{_PREFIX}accept_length", "gauge",
                     "accept length of steps with drafts since the sidecar started", length,
                     labels)  # fmt: skip
        yield Sample(f"{_PREFIX}draft_steps", "counter", "verify steps with drafts",
                     sums.verify_steps, labels)  # fmt: skip
        yield Sample(f"{_PREFIX}accepted_tokens", "counter", "draft tokens accepted",
                     sums.accepted, labels)  # fmt: skip
    for version, counts in sorted(now.positions.items()):
        yield from _positions(str(version), counts)


def _positions(version: str, counts: PositionCounts) -> Iterator[Sample]:
    by_accepted, bounds = counts.by_accepted, (-1, *_ACCEPTED, MOST_POSITIONS)
    between = [sum(by_accepted[a + 1 : b + 1]) for a, b in pairwise(bounds)]
    yield histogram(f"{_PREFIX}accepted_tokens_per_step",
                    "draft tokens accepted in a verify step with drafts", _ACCEPTED, between,
                    counts.accepted, (("version", version),))  # fmt: skip
    for position in range(1, MOST_POSITIONS + 1):
        if not (reached := sum(counts.by_depth[position:])):
            return
        labels = (("version", version), ("position", str(position)))
        yield Sample(f"{_PREFIX}position_steps", "counter",
                     "verify steps whose draft reached this position", reached,
                     labels)  # fmt: skip
        yield Sample(f"{_PREFIX}position_accepted", "counter",
                     "verify steps that accepted a draft token at this position",
                     sum(by_accepted[position:]), labels)  # fmt: skip


def _swaps(times: SwapTimes) -> Iterator[Sample]:
    yield times.apply.sample(
        f"{_PREFIX}swap_apply_seconds", "time that the server stood still for a swap"
    )
    yield times.stage.sample(
        f"{_PREFIX}swap_stage_seconds", "time that the server took to read a version beforehand"
    )
    yield times.stall.sample(
        f"{_PREFIX}swap_stall_seconds",
        "gap between two tokens of a stream with a swap between them",
    )


def _engine(counters: Mapping[str, float]) -> Iterator[Sample]:
    for source, entry in _ENGINE.items():
        if source in counters or entry.kind == "counter":
            value = entry.unit * counters.get(source, 0.0)
            yield Sample(f"{_PREFIX}engine_{entry.name}", entry.kind, entry.help, value)
    for source, carried in _STEPS.items():
        yield Sample(f"{_PREFIX}engine_steps", "counter",
                     "verify steps of the server, by whether they carried drafts",
                     counters.get(source, 0.0), (("kind", carried),))  # fmt: skip


def _costs(cost: StepCost) -> Iterator[Sample]:
    """Only what was measured; a server whose steps all carry drafts has nothing to compare."""
    ratios = {
        "speedup": ("tokens a second with drafts over those without, as measured", cost.gains),
        "break_even_accept_length": (
            "accept length at which a step with drafts pays for its longer time", cost.break_evens,
        ),
    }  # fmt: skip
    for name, (help, values) in ratios.items():
        for size, value in values.items():
            labels = (("requests_at_once", str(size)),)
            yield Sample(f"{_PREFIX}{name}", "gauge", help, value, labels)
    for carried, value_ms in (("plain", cost.plain_ms), ("drafts", cost.draft_ms)):
        if value_ms is not None:
            yield Sample(f"{_PREFIX}step_seconds", "gauge",
                         "median duration of a verify step at the batch size where both kinds are "
                         "known best", value_ms / 1000, (("kind", carried),))  # fmt: skip


def _trees(counters: Mapping[str, float]) -> Iterator[Sample]:
    shares = tree_shares(counters)
    for one in shares:
        labels = tuple(
            (name, str(getattr(one, name))) for name in ("requests_at_once", "depth", "nodes")
        )
        yield Sample(f"{_PREFIX}tree_share", "gauge", "share of the last steps that had this "
                     "tree, where each step's tree is chosen", one.share, labels)  # fmt: skip
        yield Sample(f"{_PREFIX}tree_accept_length", "gauge",
                     "accept length expected of these steps", one.accept_length,
                     labels)  # fmt: skip
    for size, count in sorted({one.requests_at_once: one.explored for one in shares}.items()):
        yield Sample(f"{_PREFIX}tree_explored", "counter",
                     "steps that found out what another tree brings", count,
                     (("requests_at_once", str(size)),))  # fmt: skip


def open_health(
    host: str,
    port: int,
    folder: Path,
    status: Callable[[], Status],
    *,
    stuck: Callable[[], str] = str,
    or_free: bool = False,
) -> HealthServer:
    """The endpoint; its address is in the log, and in ``health.json`` in the folder."""
    server = HealthServer(
        host,
        port,
        lambda: health(status()),
        lambda: samples(status()),
        stuck=stuck,
        or_free=or_free,
    )
    if server.url:
        log.info("health and metrics at %s", server.url)
        try:
            replace_file(folder / HEALTH_FILE, json.dumps({"url": server.url}).encode())
        except OSError as error:
            log.error("%s can't be written: %s", folder / HEALTH_FILE, error.strerror)
    return server
