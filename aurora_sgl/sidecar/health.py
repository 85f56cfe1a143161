"""``/healthz`` and ``/metrics`` on the loopback address."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aurora_sgl.sidecar.files import replace_file

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


class _Collector(Collector):
    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> list[Metric]:
        now = self._status()
        metrics: list[Metric] = []
        gauges = {
            **now.gauges,
            "ready": float(now.ready),
            "live_version": now.live_version_id,
            "speculation_share": now.speculation_share,
        }
        for name, value in gauges.items():
            gauge = GaugeMetricFamily(f"aurora_sidecar_{name}", name.replace("_", " "))
            gauge.add_metric([], value)
            metrics.append(gauge)
        for name, value in now.counters.items():
            counter = CounterMetricFamily(f"aurora_sidecar_{name}", name.replace("_", " "))
            counter.add_metric([], value)
            metrics.append(counter)
        lost = CounterMetricFamily(
            "aurora_sidecar_lost", "records lost, by the place where", labels=["place"]
        )
        for place, value in now.lost.items():
            lost.add_metric([place], value)
        return [*metrics, lost]


class HealthServer:
    """Answers on 127.0.0.1; its address is written to ``health.json`` in the endpoint's folder."""

    def __init__(self, port: int, folder: Path, status: Callable[[], Status]) -> None:
        """Port 0 takes a free one. A port in use is logged and the sidecar goes on without."""
        registry = CollectorRegistry()
        registry.register(_Collector(status))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                elif self.path == "/healthz":
                    now = status()
                    said = {
                        "ready": now.ready,
                        "reason": now.reason,
                        "live_version_id": now.live_version_id,
                        "live_sha256": now.live_sha256,
                        "phase": now.phase,
                    }
                    code = 200 if now.ready else 503
                    self._answer(code, "application/json", json.dumps(said).encode())
                else:
                    self._answer(404, "text/plain", b"see /healthz and /metrics\n")

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server: ThreadingHTTPServer | None = None
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            log.error("no health endpoint on port %d: %s", port, error.strerror)
            return
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()
        url = f"http://127.0.0.1:{self.port}"
        replace_file(folder / "health.json", json.dumps({"url": url}).encode())

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
