"""Whoever is asked to end, and asked again and again, ends once and in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from aurora_sgl.processes.ending import Ending
from tests.integration.scheduler.test_scheduler import Process
from tests.support import browser
from tests.support.sidecar_engine import Sidecar

Started = tuple["subprocess.Popen[bytes] | subprocess.Popen[str]", Path]


def scheduler(home: Path) -> Started:
    one = Process(home, "scheduler", port=0)
    one.says("scheduler of group")
    return one.process, one.log


def sidecar(home: Path) -> Started:
    one = Sidecar(home, home / "e")
    one.wait_ready()
    return one.process, one.log


def dashboard(home: Path) -> Started:
    one = browser.start(home)
    return one.process, home / "dashboard.err"


def storm(pid: int, *numbers: signal.Signals) -> None:
    """As fast as they go, which meets a thread at every step of its waking up, then while it
    ends."""
    with suppress(ProcessLookupError):
        for at in range(3000):
            os.kill(pid, numbers[at % len(numbers)])
        for at in range(100):
            os.kill(pid, numbers[at % len(numbers)])
            time.sleep(0.001)


@pytest.mark.parametrize("start", [scheduler, sidecar, dashboard])
def test_a_process_that_gets_a_storm_of_signals_ends_in_order(
    start: Callable[[Path], Started], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AURORA_HOME", str(tmp_path))
    process, log = start(tmp_path)
    try:
        storm(process.pid, signal.SIGTERM, signal.SIGINT)
        assert process.wait(40) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


def test_an_end_that_was_asked_for_stays_so_however_often_it_was() -> None:
    ending = Ending()
    try:
        assert not ending.wait(0)
        for _ in range(100_000):  # more than a pipe holds
            ending.ask()
        assert ending.wait() and ending.wait(0)
    finally:
        ending.close()


WAITING = """
import signal
from aurora_sgl.processes.ending import Ending
ending = Ending()
ending.on_signals(signal.SIGTERM)
print("waits", flush=True)
ending.wait()
"""


def test_a_wait_ends_however_fast_signals_come() -> None:
    """With a ``threading.Event`` one of five hangs."""
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None and process.stdout.readline() == b"waits\n"
            time.sleep(0.02)
            storm(process.pid, signal.SIGTERM)
            assert process.wait(10) in (0, -signal.SIGTERM)  # or as the interpreter itself ended
        finally:
            process.kill()
            process.wait()
