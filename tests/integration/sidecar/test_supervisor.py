"""The process that keeps a sidecar beside the engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from aurora_sgl.config import Settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.supervisor import SidecarSupervisor
from tests.support.sidecar_engine import wait_until

PARENT = """
import sys, time
from pathlib import Path
from aurora_sgl.config import Settings
from aurora_sgl.sidecar.supervisor import SidecarSupervisor
supervisor = SidecarSupervisor(Settings(home=Path(sys.argv[1])), Path(sys.argv[2]))
supervisor.start()
print(supervisor.pid, flush=True)
time.sleep(600)
"""


def ready(log: Path, times: int) -> None:
    wait_until(lambda: log.exists() and log.read_text().count(": ready: ") == times, 30)


def test_a_sidecar_that_dies_is_started_again_and_ends_with_stop(tmp_path: Path) -> None:
    supervisor = SidecarSupervisor(Settings(home=tmp_path / "home"), tmp_path / "e")
    supervisor.start()
    try:
        ready(supervisor.log_path, 1)
        first = supervisor.pid
        os.kill(first, signal.SIGKILL)
        ready(supervisor.log_path, 2)
        assert supervisor.pid not in (0, first)
        assert supervisor.restarts == 1
    finally:
        supervisor.stop()
    assert supervisor.pid == 0
    assert supervisor.log_path == tmp_path / "home" / "logs" / "sidecar.log"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_sidecar_is_left_when_the_server_is_killed_or_interrupted(
    tmp_path: Path, number: signal.Signals
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "home"), str(tmp_path / "e")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    ready(tmp_path / "home" / "logs" / "sidecar.log", 1)
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not psutil.pid_exists(pid), 15, "the end of the sidecar")


def test_an_endpoint_folder_that_is_too_long_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="choose a shorter folder"):
        SidecarSupervisor(Settings(home=tmp_path), tmp_path / ("x" * 100))
