"""The process of a training run: paused, stopped, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from aurora_sgl.processes.training import TrainingProcess
from tests.support.sidecar_engine import wait_until

ROOT = Path(__file__).resolve().parents[3]
PATHS = {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def started() -> Iterator[list[TrainingProcess]]:
    processes: list[TrainingProcess] = []
    yield processes
    for process in processes:
        process.end()


def start(started: list[TrainingProcess], *arguments: str) -> TrainingProcess:
    process = TrainingProcess(arguments, PATHS, module="tests.support.slow_worker")
    started.append(process)
    wait_until(lambda: process.progress, 30, "a first word")
    return process


def test_a_run_tells_its_progress_and_its_outcome(started: list[TrainingProcess]) -> None:
    process = start(started, "0.5")
    assert process.progress["event"] == "update"
    found = wait_until(process.outcome, 20, "the end")
    assert found == {"status": "succeeded", "version_id": 7}


def test_a_paused_run_stands_still_and_goes_on(started: list[TrainingProcess]) -> None:
    process = start(started, "60")
    process.pause()
    time.sleep(0.3)
    before = process.progress
    time.sleep(0.5)
    assert process.progress == before and process.paused
    assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    process.resume()
    wait_until(lambda: process.progress != before, 10, "it to go on")


@pytest.mark.parametrize("paused", [False, True])
def test_a_run_that_is_stopped_ends_and_says_why(
    started: list[TrainingProcess], paused: bool
) -> None:
    process = start(started, "60")
    if paused:
        process.pause()
    begun = time.monotonic()
    process.stop("learning was switched off")
    found = wait_until(process.outcome, 5, "the end")
    assert found == {"status": "failed", "error": "learning was switched off"}
    assert time.monotonic() - begun < 4


def test_a_run_that_does_not_listen_is_killed(started: list[TrainingProcess]) -> None:
    process = start(started, "60", "stubborn")
    process.stop("enough")
    assert wait_until(process.outcome, 10, "the end")["status"] == "failed"
    assert not psutil.pid_exists(process.pid)


def test_a_run_dies_with_a_scheduler_that_is_killed_even_while_it_is_paused() -> None:
    code = (
        "import time; from aurora_sgl.processes.training import TrainingProcess as P\n"
        "p = P(['60'], {}, module='tests.support.slow_worker')\n"
        "while not p.progress: time.sleep(0.05)\n"
        "p.pause(); print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **PATHS},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.Process(child).status() == psutil.STATUS_STOPPED
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not alive(child), 5, "the death of the run")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
