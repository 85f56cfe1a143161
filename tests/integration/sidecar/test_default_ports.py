"""Where a container's probe and Prometheus look when nobody chose a port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.sidecar_engine import Sidecar, wait_until


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def answers(port: int, metric: str) -> bool:
    try:
        health, metrics = (
            httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5)
            for path in ("/health", "/metrics")
        )
    except httpx.HTTPError:
        return False
    assert health.status_code in (200, 503) and "ready" in health.json()
    assert metrics.status_code == 200
    return metric in metrics.text


def test_sidecars_and_scheduler_answer_at_the_ports_that_the_docs_name(
    tmp_path: Path, ending: ExitStack
) -> None:
    for port in (8510, 8520, 8521):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port} is taken by somebody else")
    for replica in (0, 1):
        endpoint = tmp_path / f"e{replica}"
        endpoint.mkdir()
        sidecar = Sidecar(tmp_path / "home", endpoint, "--replica", str(replica))
        ending.callback(sidecar.stop)
        port = 8520 + replica
        wait_until(lambda: answers(port, "aurora_sidecar_ready"), 60, f"an answer at {port}")  # noqa: B023
        told = json.loads((endpoint / "health.json").read_text())
        assert told["url"] == f"http://127.0.0.1:{port}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AURORA_")}
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "aurora_sgl.cli", "scheduler"],
        env={**environment, "AURORA_HOME": str(tmp_path / "home")}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ending.callback(scheduler.wait, 30)
    ending.callback(scheduler.terminate)
    wait_until(lambda: answers(8510, "aurora_scheduler_leads"), 60, "an answer at 8510")
