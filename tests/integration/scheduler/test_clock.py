"""The time of day is set while a sidecar and a scheduler run: what waits goes by another clock."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, text

from benchmarks import chaos
from tests.integration.scheduler.test_scheduler import Process
from tests.support.sidecar_engine import Engine, Sidecar, wait_until

HOUR = 3600
SOON = 15.0


def last_round(scheduler: Process) -> float:
    """Seconds since the scheduler's last round, by its metrics."""
    lines = httpx.get(f"{scheduler.url}/metrics", timeout=5).text.splitlines()
    (line,) = [line for line in lines if line.startswith("aurora_scheduler_round_age_seconds")]
    return float(line.split()[-1])


@pytest.mark.parametrize("seconds", [-HOUR, HOUR])
def test_what_runs_goes_on_when_the_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """cases.md: clock set back."""
    variables = chaos.clock(tmp_path)
    if not variables:
        pytest.skip("no C compiler for the clock")
    for name, value in {**variables, "AURORA_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    url = f"sqlite:///{tmp_path / 'home' / 'aurora.db'}"
    sidecar = Sidecar(tmp_path / "home", tmp_path / "e")
    engine = Engine(tmp_path / "e", 7)
    scheduler = Process(tmp_path / "home", "scheduler", port=0)
    rows = create_engine(url)

    def stored() -> float:
        with rows.connect() as connection:
            counters = connection.scalar(text("SELECT counters FROM server"))
        return float(json.loads(counters or "{}").get("beats", 0))

    def is_stored() -> bool:
        return stored() == engine.counters["beats"]

    try:
        engine.run()
        wait_until(lambda: scheduler.health()["ready"], 40, "the scheduler to be ready")
        for moved in (seconds, 0):  # set, and put right again
            chaos.set_clock(Path(variables[chaos.CLOCK_FILE]), moved)
            time.sleep(4.0)  # a round that stopped is older than two seconds then
            for _ in range(2):
                wait_until(lambda: last_round(scheduler) < 2.0, SOON, "a round")
                engine.counters["beats"] = stored() + 1
                wait_until(is_stored, SOON, "a heartbeat's row")
        assert scheduler.health()["role"] == "leader" and sidecar.get("/health")[0] == 200
    finally:
        engine.close()
        scheduler.process.send_signal(signal.SIGTERM)
        assert scheduler.end() == sidecar.stop() == 0
        rows.dispose()
