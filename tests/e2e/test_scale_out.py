"""A fleet on one machine, by the units' own commands: two servers, SGLang's gateway, two
schedulers, a trainer of two processes, the page, PostgreSQL and Prometheus. Each is killed; all
converges. A damaged version that is staged on one server never reaches the other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from sqlalchemy import Engine, text

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.processes.server import free_port
from aurora_sgl.rollout import stages, status
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.store import queries
from tests.e2e.conftest import ROOT, TREE, until
from tests.integration.deploy.test_monitoring import panels
from tests.support.prometheus import expressions, filled_in
from tests.support.units import Service, exec_start

MONITORING = ROOT / "deploy" / "monitoring"
#: Not the demo's, so that this file can run beside the tests that wait for it.
DRAFTER = ROOT / "benchmarks" / "static-drafter"
DOMAIN = "through the gateway"
#: How often a server of this name reported that a version is live in it.
RAN = """SELECT count(*) FROM swap w JOIN server s ON s.id = w.server_id
    WHERE w.ok AND w.version_id = {} AND s.name = '{}'"""
#: The gateway drops all names but a few, and these.
HEADERS = {"x-request-id-aurora-domain": DOMAIN}
DRAFTS = ("--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens")


@dataclass
class Fleet:
    """The services by name, and the store that they share."""

    engine: Engine
    artifacts: ArtifactRoot
    environment: dict[str, str]
    services: dict[str, Service] = field(default_factory=dict)

    def add(self, name: str, command: list[str], folder: Path, ready: str, **more: str) -> Service:
        service = Service(
            name, command, folder / f"{name}.log", {**self.environment, **more}, ready
        )
        self.services[name] = service
        return service

    def aurora(self, *words: str) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "aurora-sgl"), *words],
            env={**os.environ, **self.environment}, capture_output=True, text=True,
            timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def converged(self, version_id: int) -> bool:
        rows = [row for row in status.servers(self.engine, "default") if not row.silent]
        return len(rows) == 2 and all(
            row.converged and row.live_version_id == version_id for row in rows
        )

    def value(self, query: str) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(text(query)).scalar()


class Traffic(threading.Thread):
    """Requests through the gateway, streamed, one after another; no two begin alike, so that none
    has KV of another version in its cached prefix. A failed one is tried no more."""

    def __init__(self, url: str, prompts: list[list[int]]) -> None:
        super().__init__(daemon=True)
        self._url, self._prompts, self.ending = url, prompts, threading.Event()
        self.going = threading.Event()
        self.going.set()
        self.answers = self.failures = 0

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self.ending.is_set():
                self.going.wait()
                count = self.answers + self.failures
                prompt = self._prompts[count % len(self._prompts)]
                body = {"input_ids": [1000 + count, *prompt], "stream": True,
                        "sampling_params": {"temperature": 0, "max_new_tokens": 24}}  # fmt: skip
                try:
                    with client.stream("POST", "/generate", json=body, headers=HEADERS) as answer:
                        whole = "[DONE]" in "".join(answer.iter_text())
                    self.answers += whole
                    self.failures += not whole
                except httpx.HTTPError:
                    self.failures += 1
                if self.failures:
                    self.ending.wait(0.5)

    def go_on(self, answers: int = 2, seconds: float = 180) -> None:
        since = self.answers
        until(lambda: self.answers >= since + answers, seconds, "answers through the gateway")


def prometheus_files(folder: Path, ports: dict[str, list[int]], own: int) -> Path:
    """Our configuration with this test's ports, looking and deciding sooner than in an hour."""
    shutil.copytree(MONITORING, folder)
    config = (folder / "prometheus.yml").read_text().replace("127.0.0.1:9090", f"127.0.0.1:{own}")
    config = re.sub(r"(scrape_interval|evaluation_interval): \S+", r"\1: 2s", config)
    config = re.sub(r"scrape_timeout: \S+", "scrape_timeout: 2s", config)
    (folder / "prometheus.yml").write_text(re.sub(r"refresh_interval: \S+", "refresh_interval: 2s",
                                                  config))  # fmt: skip
    rules = folder / "rules" / "aurora.yml"
    rules.write_text(re.sub(r"for: \d+m", "for: 4s", rules.read_text()))
    entries = [
        {
            "targets": [f"127.0.0.1:{port}"],
            "labels": {"job": job, "group": "default"}
            | ({"server": f"server{n}"} if job in ("sglang", "aurora-sidecar") else {}),
        }
        for job, numbers in ports.items()
        for n, port in enumerate(numbers, 1)
    ]
    (folder / "targets.yml").write_text(json.dumps(entries))  # JSON is YAML
    return folder / "prometheus.yml"


class Prometheus:
    """What its API says."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def _get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def up(self) -> dict[str, int]:
        """By target: 1 while it was scraped."""
        rows = self._get("query", query="up")["result"]
        return {row["metric"]["instance"]: int(row["value"][1]) for row in rows}

    def empty(self) -> set[str]:
        """Panels of SGLang's own series, some of them joined with ours, that show nothing."""
        theirs = [one for one in expressions(panels()) if "aurora_" not in one[1]]
        assert len(theirs) > 8
        return {
            title
            for title, expression in theirs
            if not self._get("query", query=filled_in(expression))["result"]
        }

    def firing(self) -> set[str]:
        alerts = self._get("alerts")["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}


@pytest.fixture
def fleet(
    tmp_path: Path, postgres_database: str, model: Path
) -> Iterator[tuple[Fleet, Prometheus, str]]:
    engine = store.connect(postgres_database)
    store.upgrade(engine)
    one = Fleet(
        engine,
        ArtifactRoot(str(tmp_path / "home" / "artifacts")),
        {
            "AURORA_HOME": str(tmp_path / "home"), "AURORA_DATABASE_URL": postgres_database,
            "AURORA_SCHEDULER_REQUESTS": "24", "AURORA_SCHEDULER_MINUTES": "0",
            "AURORA_SCHEDULER_LEASE_SECONDS": "5", "AURORA_SCHEDULER_EXPLORE": "0",
            "AURORA_SCHEDULER_PAUSE_QUEUE": "0", "AURORA_SCHEDULER_SLOW_QUEUE": "0",
            "AURORA_WATCH_WINDOWS": "2", "AURORA_WATCH_REQUESTS": "3", "AURORA_WATCH_STEPS": "30",
            "AURORA_LOG_FORMAT": "json", "AURORA_SPECULATION": "on",
            "OMP_NUM_THREADS": "1", "MODEL": str(model), "SGLANG_PLUGINS": "aurora",
        },
    )  # fmt: skip
    (tmp_path / "home").mkdir()
    ports: dict[str, list[int]] = {"sglang": [], "aurora-sidecar": [], "aurora-scheduler": []}
    for number in (1, 2):
        port, health = free_port(), free_port()
        ports["sglang"].append(port)
        ports["aurora-sidecar"].append(health)
        shape = " ".join(f"{flag} {size}" for flag, size in zip(DRAFTS, TREE, strict=True))
        more = {
            "AURORA_HEALTH_PORT": str(health), "AURORA_SERVER_NAME": f"server{number}",
            "SERVE_FLAGS": f"--drafter {DRAFTER} --port {port} --enable-metrics --dtype bfloat16 "
            f"--max-running-requests 4 --max-total-tokens 4096 {shape}",
        }  # fmt: skip
        command = exec_start("aurora-server.service", {**one.environment, **more})
        one.add(f"server{number}", command, tmp_path, f"http://127.0.0.1:{port}/health", **more)
    for number in (1, 2):
        port = free_port()
        ports["aurora-scheduler"].append(port)
        more = {
            "AURORA_SCHEDULER_PORT": str(port),
            "SCHEDULER_FLAGS": "--set workers=2 --set passes=1 --set max_seconds=60",
        }
        command = exec_start("aurora-scheduler.service", {**one.environment, **more})
        one.add(f"scheduler{number}", command, tmp_path, f"http://127.0.0.1:{port}/readyz", **more)
    port = free_port()
    more = {"DASHBOARD_FLAGS": f"--port {port}"}
    command = exec_start("aurora-dashboard.service", {**one.environment, **more})
    one.add("dashboard", command, tmp_path, f"http://127.0.0.1:{port}/_stcore/health", **more)
    gateway, metrics = free_port(), free_port()
    ports["gateway"] = [metrics]
    urls = [f"http://127.0.0.1:{port}" for port in ports["sglang"]]
    one.add(
        "gateway",
        [sys.executable, "-m", "tests.support.gateway", str(gateway), str(metrics), *urls],
        tmp_path, f"http://127.0.0.1:{gateway}/readiness",
    )  # fmt: skip
    own = free_port()
    config = prometheus_files(tmp_path / "monitoring", ports, own)
    one.add(
        "prometheus",
        ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{own}",
         f"--storage.tsdb.path={tmp_path / 'tsdb'}"],
        tmp_path, f"http://127.0.0.1:{own}/-/ready",
    )  # fmt: skip
    try:
        yield one, Prometheus(own), f"http://127.0.0.1:{gateway}"
    finally:
        for service in reversed(one.services.values()):
            service.end()
        engine.dispose()


def test_everything_that_is_killed_comes_back_and_the_fleet_converges(
    fleet: tuple[Fleet, Prometheus, str], prompts: list[list[int]], tmp_path: Path
) -> None:
    one, prometheus, gateway = fleet
    services = one.services
    for service in services.values():
        service.start()
    for service in services.values():
        service.wait_ready(600)
    first = until(lambda: live(one), 120, "a live version")
    until(lambda: one.converged(first), 120, "both servers on it")
    until(lambda: set(prometheus.up().values()) == {1}, 90, f"targets: {prometheus.up()}")
    assert len(prometheus.up()) == 8  # 2 SGLang, 2 sidecars, 2 schedulers, the gateway, itself
    traffic = Traffic(gateway, prompts)
    traffic.start()
    traffic.go_on(24, 600)

    served = f"SELECT count(DISTINCT server_id) FROM request WHERE domain = '{DOMAIN}'"
    until(lambda: one.value(served) == 2, 60, "the header's domain, from both servers")
    traffic.going.clear()  # so that the run, at its low priority, gets a turn on two cores
    run = until(lambda: finished_run(one), 900, "a training run of two processes")
    traffic.going.set()
    assert run.status == "succeeded", run.error
    assert (run.config["workers"], run.requests > 0) == (2, True)

    leader, standby = roles(one)
    for name in (leader, "dashboard", "prometheus", "gateway", "server2"):
        services[name].kill()
        if name == "server2":
            traffic.go_on()  # the gateway goes on with the other one
            until(lambda: "AuroraTargetDown" in prometheus.firing(), 120, "the alert")
        elif name == leader:
            until(lambda: roles(one)[0] == standby, 60, "the other scheduler to lead")
        services[name].start()
        services[name].wait_ready(600)
        traffic.go_on()
    until(lambda: set(prometheus.up().values()) == {1}, 120, "all targets up again")
    until(lambda: "AuroraTargetDown" not in prometheus.firing(), 120, "the alert's end")

    other = import_version(one.engine, one.artifacts, changed(tmp_path, "nearly"), group_id(one)).id
    assert other != first
    one.aurora("promote", str(other), "--reason", "by hand", "--force")
    until(lambda: one.converged(other), 180, "both servers to follow")
    traffic.go_on()
    one.aurora("rollback", "--reason", "as before")
    until(lambda: one.converged(live(one)), 180, "both servers to come back")
    # With no alert on there is nothing to list.
    until(lambda: prometheus.empty() <= {"Alerts of Prometheus"}, 60, "the board's panels")
    stage_a_damaged_version(one, traffic, tmp_path)
    traffic.ending.set()
    traffic.join(120)
    assert live(one) != other
    assert one.value("SELECT count(*) FROM request WHERE status = 'running'") <= 1
    running = one.value("SELECT count(*) FROM server WHERE state = 'running'")
    for name in ("server1", "server2"):  # as systemd, Docker and Kubernetes end them
        assert services[name].end() == 0, services[name].text()[-3000:]
    ended = one.value("SELECT count(*) FROM server WHERE state = 'running'")
    assert running - ended == 2, "their sidecars told the store"
    for name, service in services.items():
        log = service.text()
        assert "Traceback" not in log or name in ("gateway", "server2"), (name, log[-3000:])


def stage_a_damaged_version(one: Fleet, traffic: Traffic, folder: Path) -> None:
    """It is taken back from the server that ran it first, by the scheduler; the other one goes on
    with what is live and never runs it."""
    before = live(one)
    damaged = import_version(
        one.engine, one.artifacts, changed(folder, "damaged"), group_id(one)
    ).id
    one.aurora("promote", str(damaged), "--stage", "server1", "--goes-on", "--reason", "look first")

    def look() -> stages.StageStatus:
        found = stages.current(one.engine, "default")
        assert found is not None
        return found

    until(lambda: one.value(RAN.format(damaged, "server1")), 180, "the first server to run it")
    traffic.go_on()
    ended = until(lambda: None if look().is_open else look(), 400, f"its end: {look().sentence}")
    assert (ended.stage.status, ended.stage.servers) == ("failed", ["server1"]), ended.sentence
    assert "worse" in ended.stage.outcome, ended.stage.outcome
    until(lambda: one.converged(before), 180, "the first server to come back")
    assert live(one) == before and one.value(RAN.format(damaged, "server2")) == 0
    drafted = f"""SELECT count(DISTINCT s.name), min(s.name) FROM acceptance_event e
        JOIN request r ON r.id = e.request_id JOIN server s ON s.id = r.server_id
        WHERE e.drafter_version_id = {damaged} AND e.depth > 0"""
    with one.engine.connect() as connection:
        assert tuple(connection.execute(text(drafted)).one()) == (1, "server1")


def live(one: Fleet) -> int:
    with store.session(one.engine, write=False) as s:
        groups = queries.groups.groups(s)
        return queries.aliases.aliases(s, groups[0].id).get("live", 0) if groups else 0


def group_id(one: Fleet) -> int:
    with store.session(one.engine, write=False) as s:
        return queries.groups.group_by_name(s, "default").id


def finished_run(one: Fleet) -> Any:
    with store.session(one.engine, write=False) as s:
        rows = queries.runs.runs(s, queries.groups.group_by_name(s, "default").id)
    return next((row for row in rows if row.status != "running"), None)


def roles(one: Fleet) -> tuple[str, str]:
    """Names of the scheduler that leads and of the other one; "" for what nobody is."""
    names = {"leader": "", "standby": ""}
    for name in ("scheduler1", "scheduler2"):
        service = one.services[name]
        if service.process is not None and service.process.poll() is None and service.is_ready():
            names[httpx.get(service.ready, timeout=10).json()["role"]] = name
    return names["leader"], names["standby"]


def changed(folder: Path, how: str) -> Path:
    """``nearly``: the same drafter with other bytes; ``damaged``: one that drafts nonsense."""
    from safetensors.torch import load_file, save_file

    made = folder / how
    shutil.copytree(DRAFTER, made)
    tensors = load_file(made / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    if how == "nearly":
        tensors[name] = tensors[name] * 1.02  # less would round to the same in bfloat16
    else:
        head = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = head[torch.randperm(len(head))].contiguous()
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made
