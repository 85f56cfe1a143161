"""``/health`` and ``/metrics`` as people ask for them."""

from __future__ import annotations

import http.client
import logging
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aurora_sgl import health, wire
from aurora_sgl.config import SchedulerSettings, Settings
from aurora_sgl.health import HealthServer, Observations, Sample, families
from aurora_sgl.intervals import accept_length
from aurora_sgl.sidecar import health as sidecar_health
from aurora_sgl.sidecar.served import MOST_POSITIONS, MOST_VERSIONS, LiveCounts
from aurora_sgl.sidecar.supervisor import SidecarSupervisor
from tests.support import store_samples as samples

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


# -- histograms ------------------------------------------------------------------------------------


def test_a_histogram_counts_what_lies_up_to_each_bound() -> None:
    seconds = Observations((0.01, 0.5, 2))
    for value in (0.0, 0.01, 0.011, 2.0, 2.1, 400.0):
        seconds.observe(value)
    (family,) = families([seconds.sample("aurora_x_seconds", "x")])
    told = {(one.name, one.labels.get("le")): one.value for one in family.samples}
    assert told == {
        ("aurora_x_seconds_bucket", "0.01"): 2, ("aurora_x_seconds_bucket", "0.5"): 3,
        ("aurora_x_seconds_bucket", "2.0"): 4, ("aurora_x_seconds_bucket", "+Inf"): 6,
        ("aurora_x_seconds_count", None): 6, ("aurora_x_seconds_sum", None): pytest.approx(404.121),
    }  # fmt: skip


def test_an_empty_histogram_is_told_too_so_that_its_first_value_is_an_increase() -> None:
    (family,) = families([Observations((1.0,)).sample("aurora_x_seconds", "x")])
    assert [one.value for one in family.samples] == [0, 0, 0, 0]


def told_of(counts: LiveCounts, boot: int = 0) -> dict[str, dict[tuple[str, ...], float]]:
    """By name of a series: values by their labels' values."""
    now = sidecar_health.Status(
        True, "", boot, "", "", 1.0, {}, {},
        served=counts.sums(boot), positions=counts.positions(boot), swaps=counts.times,
    )  # fmt: skip
    told: dict[str, dict[tuple[str, ...], float]] = {}
    for family in families(sidecar_health.samples(now)):
        for one in family.samples:
            told.setdefault(one.name, {})[tuple(one.labels.values())] = one.value
    return told


def test_series_of_steps_hold_the_identities_of_accept_length() -> None:
    """accept length = 1 + sum of acceptance by position; the histogram sums to the steps, and
    weighted to the accepted tokens."""
    rng, counts, accepted = random.Random(3), LiveCounts(), [0] * 600
    for number in range(600):
        depth = rng.choice([0, 1, 3, 5, 20])
        accepted[number] = rng.randint(0, depth) if depth != 20 else rng.choice([15, 16])
        counts.heard(samples.chain_step(1, number, accepted[number], depth=depth, version_id=7))
    told = told_of(counts)
    steps, total = told["aurora_sidecar_draft_steps_total"][("7", "default")], sum(accepted)
    assert steps < 600 and told["aurora_sidecar_accepted_tokens_total"][("7", "default")] == total
    places = told["aurora_sidecar_position_accepted_total"]
    assert 1 + sum(places.values()) / steps == pytest.approx(accept_length(total, int(steps)))
    reached = told["aurora_sidecar_position_steps_total"]
    assert reached["7", "1"] == steps
    assert all(0 <= places[key] <= reached[key] for key in reached)
    buckets = told["aurora_sidecar_accepted_tokens_per_step_bucket"]
    assert buckets["7", "+Inf"] == told["aurora_sidecar_accepted_tokens_per_step_count"]["7",]
    assert buckets["7", "+Inf"] == steps
    assert told["aurora_sidecar_accepted_tokens_per_step_sum"]["7",] == total
    assert buckets["7", "0.0"] == steps - places["7", "1"]
    assert buckets["7", "8.0"] == steps - places["7", "9"]


def test_labels_stay_few_whatever_is_drafted_and_however_often_a_version_goes_live() -> None:
    counts = LiveCounts()
    for version in range(1, 3 * MOST_VERSIONS):
        for domain in range(7):
            number = 10 * version + domain
            counts.heard(samples.started(number, domain=f"domain {domain}"))
            counts.heard(samples.chain_step(number, 0, 90, depth=90, version_id=version))
    told = told_of(counts)
    last = {str(version) for version in range(2 * MOST_VERSIONS, 3 * MOST_VERSIONS)}
    assert {labels[0] for labels in told["aurora_sidecar_position_steps_total"]} == last
    assert {labels[0] for labels in told["aurora_sidecar_draft_steps_total"]} == last
    places = {labels[1] for labels in told["aurora_sidecar_position_steps_total"]}
    assert places == {str(place) for place in range(1, MOST_POSITIONS + 1)}
    assert len(told["aurora_sidecar_draft_steps_total"]) <= 200 + MOST_VERSIONS


def test_what_was_served_before_the_drafter_had_a_number_counts_under_its_number() -> None:
    counts = LiveCounts()
    for version, accepted in ((0, 1), (4, 2), (0, 3)):
        counts.heard(samples.chain_step(1, accepted, accepted, version_id=version))
    assert told_of(counts, boot=4)["aurora_sidecar_accepted_tokens_total"] == {("4", "default"): 6}
    told = told_of(counts, boot=4)["aurora_sidecar_position_accepted_total"]
    assert told == {("4", "1"): 3, ("4", "2"): 2, ("4", "3"): 1}
    assert set(told_of(counts)["aurora_sidecar_position_accepted_total"]) > {("0", "1"), ("4", "1")}


def test_a_swap_is_told_in_seconds_and_a_refused_one_took_none() -> None:
    counts = LiveCounts()
    for number, gap_us in ((1, 4_000), (2, 70_000)):
        for step, (age, at_us) in enumerate(((90, 0), (0, gap_us), (1, gap_us + 900_000))):
            at = samples.START_US + at_us
            counts.heard(samples.chain_step(number, step, 1, swap_age=age, at_us=at))
    for ok in (True, False):
        counts.heard(wire.SwapDone(samples.BOOT, 1, 2, ok, "", "", 1500.0, 3.0))
    told = told_of(counts)
    stalls = told["aurora_sidecar_swap_stall_seconds_bucket"]
    assert (stalls["0.005",], stalls["0.05",], stalls["0.1",], stalls["+Inf",]) == (1, 1, 2, 2)
    assert told["aurora_sidecar_swap_apply_seconds_sum"] == {(): 0.003}
    assert told["aurora_sidecar_swap_stage_seconds_sum"] == {(): 1.5}


def test_what_is_told_of_the_server_has_the_names_of_its_heartbeat() -> None:
    folder = Path(sidecar_health.__file__).parents[1] / "engine"
    says = "".join((folder / f"{name}.py").read_text() for name in ("agent", "capture", "policy"))
    names = {*sidecar_health._ENGINE, *sidecar_health._STEPS}
    assert len(names) > 10 and [name for name in names if f'"{name}"' not in says] == []
