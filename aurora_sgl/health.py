"""``/health``, ``/livez``, ``/readyz`` and ``/metrics`` of a process of ours."""

from __future__ import annotations

import json
import logging
import socket
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from itertools import accumulate
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

#: Seconds for which a connection may say nothing.
PATIENCE = 5.0
METHODS = ("GET", "HEAD")
READY_PATHS = ("/health", "/healthz", "/readyz")


@dataclass(frozen=True)
class Sample:
    """One value of one metric. ``kind`` is gauge, counter or histogram; a name of a counter says no
    _total. Of a histogram ``value`` is the sum of what was observed."""

    name: str
    kind: str
    help: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()
    buckets: tuple[tuple[str, float], ...] = ()  # of a histogram: how many up to each bound, +Inf


def histogram(
    name: str,
    help: str,
    bounds: Sequence[float],
    counts: Sequence[float],
    total: float,
    labels: tuple[tuple[str, str], ...] = (),
) -> Sample:
    """``counts``: how many values lay up to each bound and above the one before it, and, one more,
    above the last; ``total``: the sum of all values."""
    names = (*(str(float(bound)) for bound in bounds), "+Inf")
    buckets = tuple(zip(names, accumulate(map(float, counts)), strict=True))
    return Sample(name, "histogram", help, total, labels, buckets)


class Observations:
    """How often values lay between bounds. One thread observes, others may read meanwhile."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1  # a bound belongs to its bucket
        self._total += value

    def sample(self, name: str, help: str) -> Sample:
        return histogram(name, help, self._bounds, tuple(self._counts), self._total)


_FAMILIES: dict[str, type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


def families(samples: Iterable[Sample]) -> list[Metric]:
    """Samples as Prometheus takes them: those of one name together."""
    by_name: dict[str, CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily] = {}
    for sample in samples:
        if sample.name not in by_name:
            names = [name for name, _ in sample.labels]
            by_name[sample.name] = _FAMILIES[sample.kind](sample.name, sample.help, labels=names)
        family, labels = by_name[sample.name], [value for _, value in sample.labels]
        if isinstance(family, HistogramMetricFamily):
            family.add_metric(labels, sample.buckets, sample.value)
        else:
            family.add_metric(labels, sample.value)
    return list(by_name.values())


class _Collector(Collector):
    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples

    def collect(self) -> list[Metric]:
        return families(self._samples())


class _Listener(ThreadingHTTPServer):
    """Of either family of addresses; where all of IPv6 is meant, of IPv4 too."""

    tells: _Tells  # set before it serves

    def __init__(self, family: int, address: Any, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = family
        super().__init__(address, handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)  # HTTPServer would ask for the host's name first, and wait
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]


def _listen(
    host: str, port: int, handler: type[BaseHTTPRequestHandler], or_free: bool
) -> _Listener:
    """Raises ``OSError`` or what ``socket`` raises for a name or number that is none."""
    if not 0 <= port <= 65535:
        raise OverflowError("a port is at most 65535")
    hosts = [host, "0.0.0.0"] if host == "::" else [host]  # a machine without IPv6
    failure: Exception | None = None
    for number in [port, 0] if or_free and port else [port]:
        for name in hosts:
            try:
                family, address = _address(name, number)
                return _Listener(family, address, handler)
            except (OSError, ValueError, OverflowError) as error:
                failure = failure or error
    assert failure is not None
    raise failure


def _address(host: str, port: int) -> tuple[int, Any]:
    """Family and address of a name; of one that has several an IPv4 address."""
    every = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(every, key=lambda one: one[0] != socket.AF_INET)
    return family, address


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _names_loopback(header: str, chosen: str) -> bool:
    """Whether a header Host is a name of this machine for itself. A page of another site that lets
    its own name point here (DNS rebinding) sends that name."""
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    return name == chosen.lower() or _is_loopback(name)


class _Tells:
    """What a listener tells."""

    def __init__(
        self,
        host: str,
        health: Callable[[], dict[str, Any]],
        samples: Callable[[], Iterable[Sample]],
        stuck: Callable[[], str],
    ) -> None:
        self.host = host  # as it was chosen
        self.health, self.stuck = health, stuck
        self.registry = CollectorRegistry()
        self.registry.register(_Collector(samples))


class _Handler(BaseHTTPRequestHandler):
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(PATIENCE)

    def parse_request(self) -> bool:
        """Whether it is to be answered; else it was refused."""
        if not super().parse_request():
            return False
        if self.command not in METHODS:
            self._answer(405, "text/plain", b"only GET and HEAD are answered\n")
            return False
        if not self._is_asked_by_our_name():
            line = b"not under this host name; ask 127.0.0.1, or listen on an address\n"
            self._answer(403, "text/plain", line)
            return False
        return True

    def _is_asked_by_our_name(self) -> bool:
        if not _is_loopback(str(self.server.server_address[0])):
            return True
        names = self.headers.get_all("Host", [])
        return all(_names_loopback(name, self.server.tells.host) for name in names)

    def do_GET(self) -> None:
        path, tells = urlsplit(self.path).path, self.server.tells
        if path == "/metrics":
            self._answer(200, CONTENT_TYPE_LATEST, generate_latest(tells.registry))
        elif path in READY_PATHS:
            now = tells.health()
            code = 200 if now["ready"] else 503
            self._answer(code, "application/json", json.dumps(now).encode())
        elif path == "/livez":
            stuck = tells.stuck()
            body = json.dumps({"live": not stuck, "reason": stuck}).encode()
            self._answer(503 if stuck else 200, "application/json", body)
        else:
            self._answer(404, "text/plain", b"see /health, /livez and /metrics\n")

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if code == 405:
            self.send_header("Allow", ", ".join(METHODS))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class HealthServer:
    """Answers ``/health`` (also ``/healthz`` and ``/readyz``): 200 when ready, else 503 with the
    reason; and ``/livez``: 503 only when nothing but a new process will help."""

    def __init__(
        self,
        host: str,
        port: int,
        health: Callable[[], dict[str, Any]],
        samples: Callable[[], Iterable[Sample]],
        *,
        stuck: Callable[[], str] = str,
        or_free: bool = False,
    ) -> None:
        """``health`` has ``ready`` and ``reason``; ``stuck`` says why the process should be started
        anew, "" while it does its work or waits for others. Port 0 takes a free one, and so does
        one that is in use with ``or_free``. Otherwise a port in use is logged, and the process
        goes on without: ``url`` is empty, and ``error`` says why. On loopback only names of
        loopback are answered; on an address that somebody chose, every name that leads
        there."""
        self._server: _Listener | None = None
        self.url = self.error = ""
        try:
            self._server = _listen(host, port, _Handler, or_free)
        except (OSError, ValueError, OverflowError) as error:  # in use, or no name, or no port
            why = getattr(error, "strerror", None) or error
            self.error = f"There is no health endpoint on {host}, port {port}: {why}"
            log.error("%s", self.error)
            return
        self._server.tells = _Tells(host, health, samples, stuck)
        shown = str(self._server.server_address[0]) if host == "::" else host
        shown = f"[{shown}]" if ":" in shown else shown
        self.url = f"http://{shown}:{self._server.server_address[1]}"
        if port and self._server.server_address[1] != port:
            log.warning("port %d is taken; health and metrics are at %s", port, self.url)
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
