"""``/health`` and ``/metrics`` of a process of ours."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One value of one metric. ``kind`` is gauge or counter; a name of a counter says no _total."""

    name: str
    kind: str
    help: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


def families(samples: Iterable[Sample]) -> list[Metric]:
    """Samples as Prometheus takes them: those of one name together."""
    by_name: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
    for sample in samples:
        if sample.name not in by_name:
            kind = GaugeMetricFamily if sample.kind == "gauge" else CounterMetricFamily
            names = [name for name, _ in sample.labels]
            by_name[sample.name] = kind(sample.name, sample.help, labels=names)
        by_name[sample.name].add_metric([value for _, value in sample.labels], sample.value)
    return list(by_name.values())


class _Collector(Collector):
    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples

    def collect(self) -> list[Metric]:
        return families(self._samples())


class HealthServer:
    """Answers ``/health`` (and ``/healthz``): 200 when ready, else 503 with the reason."""

    def __init__(
        self,
        host: str,
        port: int,
        health: Callable[[], dict[str, Any]],
        samples: Callable[[], Iterable[Sample]],
    ) -> None:
        """``health`` has ``ready`` and ``reason``. Port 0 takes a free one. A port in use is
        logged, and the process goes on without: ``url`` is empty, and ``error`` says why."""
        registry = CollectorRegistry()
        registry.register(_Collector(samples))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                elif self.path in ("/health", "/healthz"):
                    now = health()
                    code = 200 if now["ready"] else 503
                    self._answer(code, "application/json", json.dumps(now).encode())
                else:
                    self._answer(404, "text/plain", b"see /health and /metrics\n")

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server: ThreadingHTTPServer | None = None
        self.url = self.error = ""
        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except (OSError, ValueError) as error:  # a port in use, a name that is none
            why = getattr(error, "strerror", None) or error
            self.error = f"There is no health endpoint on {host}, port {port}: {why}"
            log.error("%s", self.error)
            return
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
