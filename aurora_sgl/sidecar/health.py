"""What the sidecar's ``/health`` and ``/metrics`` say."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aurora_sgl.atomic import replace_file
from aurora_sgl.health import HealthServer, Sample
from aurora_sgl.intervals import accept_length
from aurora_sgl.sidecar.endpoint import HEALTH_FILE
from aurora_sgl.sidecar.served import Sums
from aurora_sgl.step_cost import TreeShare

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
    trees: Sequence[TreeShare] = ()  # of the server's last steps, where it chooses their trees
    oldest_unstored_seconds: float = 0.0  # age of the oldest record that the store has not


def health(now: Status) -> dict[str, Any]:
    names = ("ready", "reason", "live_version_id", "live_sha256", "phase", "notices")
    return {name: getattr(now, name) for name in names} | {
        "oldest_unstored_seconds": round(now.oldest_unstored_seconds, 1),
        "lost": {place: int(count) for place, count in now.lost.items() if count},
    }


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
            yield Sample(f"aurora_sidecar_{name}", kind, name.replace("_", " "), value)
    for place, value in now.lost.items():
        yield Sample("aurora_sidecar_lost", "counter",
                     "records lost, by the place where (trace: traces; malformed: messages)", value,
                     (("place", place),))  # fmt: skip
    for code in sorted(now.notices):
        yield Sample("aurora_sidecar_notice", "gauge",
                     "1 for each thing that is wrong or switched off in the server", 1.0,
                     (("code", code),))  # fmt: skip
    for (version, domain), sums in sorted(now.served.items()):
        labels = (("version", str(version)), ("domain", domain))
        length = accept_length(sums.accepted, sums.verify_steps)
        yield Sample("aurora_sidecar_accept_length", "gauge",
                     "accept length of steps with drafts since the sidecar started", length,
                     labels)  # fmt: skip
        yield Sample("aurora_sidecar_draft_steps", "counter", "verify steps with drafts",
                     sums.verify_steps, labels)  # fmt: skip
        yield Sample("aurora_sidecar_accepted_tokens", "counter", "draft tokens accepted",
                     sums.accepted, labels)  # fmt: skip

    yield from _trees(now.trees)


def _trees(shares: Sequence[TreeShare]) -> Iterator[Sample]:
    for one in shares:
        labels = tuple(
            (name, str(getattr(one, name))) for name in ("requests_at_once", "depth", "nodes")
        )
        yield Sample("aurora_sidecar_tree_share", "gauge", "share of the last steps that had this "
                     "tree, where each step's tree is chosen", one.share, labels)  # fmt: skip
        yield Sample("aurora_sidecar_tree_accept_length", "gauge",
                     "accept length expected of these steps", one.accept_length,
                     labels)  # fmt: skip
    for size, count in sorted({one.requests_at_once: one.explored for one in shares}.items()):
        yield Sample("aurora_sidecar_tree_explored", "counter",
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
