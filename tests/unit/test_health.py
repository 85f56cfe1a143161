"""``/health`` and ``/metrics`` as people ask for them."""

from __future__ import annotations

import http.client
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aurora_sgl import health
from aurora_sgl.config import SchedulerSettings, Settings
from aurora_sgl.health import HealthServer, Sample
from aurora_sgl.sidecar.supervisor import SidecarSupervisor

Open = Callable[..., HealthServer]


@pytest.fixture
def opened() -> Iterator[Open]:
    servers: list[HealthServer] = []

    def open_one(host: str = "127.0.0.1", port: int = 0, **how: Any) -> HealthServer:
        def samples() -> list[Sample]:
            return [Sample("x", "gauge", "x", 1.0)]

        servers.append(HealthServer(host, port, lambda: {"ready": True}, samples, **how))
        return servers[-1]

    yield open_one
    for server in servers:
        server.close()


def ask(
    server: HealthServer, method: str, path: str, host: str = "127.0.0.1", **headers: str
) -> tuple[int, bytes]:
    port = int(server.url.rsplit(":", 1)[1])
    with closing(http.client.HTTPConnection(host, port, timeout=5)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


PATHS = {
    "/health": 200, "/healthz": 200, "/metrics": 200, "/metrics?x=1": 200,
    "/health?verbose&x=%00": 200, "/metrics#top": 200, "/": 404, "/healthy": 404,
}  # fmt: skip


def test_a_probe_is_answered_whatever_its_method_and_query(opened: Open) -> None:
    """cases.md: HEAD /health, /metrics?x=1."""
    server = opened()
    for path, code in PATHS.items():
        for method in ("GET", "HEAD"):
            status, body = ask(server, method, path)
            assert (path, method, status) == (path, method, code)
            assert bool(body) == (method == "GET")


#: Who asks, by the name under which he does, and whether an endpoint of loopback answers him.
ASKERS = {
    "127.0.0.1": True, "127.0.0.1:8520": True, "127.1.2.3": True, "localhost:8520": True,
    "LOCALHOST": True, "[::1]:8520": True, "evil.example": False, "evil.example:8520": False,
    "localhost.evil.example": False, "127.0.0.1.evil.example": False, "10.0.0.7": False,
    "me@evil.example": False, "[": False, "": False, "[::1": False, "0.0.0.0": False,
}  # fmt: skip


@pytest.mark.parametrize("path", ["/health", "/metrics", "/other"])
def test_an_endpoint_of_loopback_answers_under_names_of_loopback_alone(
    opened: Open, path: str
) -> None:
    """DNS rebinding: a page of another site whose name points to 127.0.0.1."""
    for chosen in ("127.0.0.1", "localhost"):
        server = opened(chosen)
        for name, answered in ASKERS.items():
            status, body = ask(server, "GET", path, Host=name)
            assert status == (PATHS.get(path, 404) if answered else 403), name
            assert answered or body.startswith(b"not under this host name"), name


def test_a_request_without_a_host_and_one_with_two(opened: Open) -> None:
    for headers, status in (("", b"200"), ("Host: localhost\r\nHost: evil.example\r\n", b"403")):
        answer = raw(opened(), f"GET /metrics HTTP/1.0\r\n{headers}\r\n".encode())
        assert answer.split()[1] == status


@pytest.mark.parametrize("chosen", ["0.0.0.0", "::"])
def test_on_an_address_that_somebody_chose_prometheus_scrapes_under_any_name(
    opened: Open, chosen: str
) -> None:
    server = opened(chosen)
    for name in ("gpu-1.example:8520", "10.0.0.7:8520", "localhost"):
        assert ask(server, "GET", "/metrics", Host=name)[0] == 200


@pytest.mark.parametrize("path", PATHS)
def test_only_get_and_head_are_answered(opened: Open, path: str) -> None:
    server = opened()
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
        status, body = ask(server, method, path)
        assert (method, status, body) == (method, 405, b"only GET and HEAD are answered\n")
        assert b"Allow: GET, HEAD" in raw(server, f"{method} {path} HTTP/1.0\r\n\r\n".encode())


def raw(server: HealthServer, request: bytes) -> bytes:
    """Everything that is answered until the connection ends."""
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("begun", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nHost: local"])
def test_a_connection_that_says_nothing_ends(
    opened: Open, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    """And the next one is answered meanwhile."""
    assert health.PATIENCE == 5.0
    monkeypatch.setattr(health, "PATIENCE", 0.3)
    server = opened()
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as idle:
        idle.sendall(begun)
        assert ask(server, "GET", "/health")[0] == 200
        assert idle.recv(100) == b""


@pytest.mark.parametrize("host", ["::", "0.0.0.0", "localhost", ""])
def test_an_address_that_means_all_or_loopback_is_listened_on(opened: Open, host: str) -> None:
    """cases.md: AURORA_HEALTH_HOST=::."""
    server = opened(host)
    assert server.error == ""
    assert ask(server, "GET", "/health")[0] == 200
    if host == "::" and server.url.startswith("http://[::]"):
        assert ask(server, "GET", "/health", "::1")[0] == 200


def test_the_default_port_falls_to_a_free_one_with_a_line_and_a_chosen_one_does_not(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with caplog.at_level(logging.WARNING):
            server = opened(port=port, or_free=True)
        assert ask(server, "GET", "/health")[0] == 200
        (line,) = [record.getMessage() for record in caplog.records]
        assert line == f"port {port} is taken; health and metrics are at {server.url}"
        assert "Address already in use" in opened(port=port).error


def test_a_port_beyond_the_last_one_costs_the_endpoint_alone(opened: Open) -> None:
    assert "no health endpoint" in opened(port=70_000, or_free=True).error


def test_ports_are_fixed_and_a_sidecar_is_told_a_port_only_when_somebody_chose_one(
    tmp_path: Path,
) -> None:
    """cases.md: ports of sidecar and scheduler."""
    assert (Settings().health_port, SchedulerSettings().port) == (8520, 8510)
    for chosen, expected in (({}, None), ({"health_port": 9000}, "9000")):
        settings = Settings(home=tmp_path, **chosen)
        environment = SidecarSupervisor(settings, tmp_path / "e")._environment()
        assert environment.get("AURORA_HEALTH_PORT") == expected
