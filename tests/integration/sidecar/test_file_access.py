"""A data folder after a run of its components, each started under a umask that hides nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from aurora_sgl.config import Settings
from aurora_sgl.engine.channel import Channel
from aurora_sgl.sidecar.supervisor import SidecarSupervisor
from tests.integration.sidecar.test_capture import BOOT, serve
from tests.support import store_samples as samples
from tests.support.capture_parts import House
from tests.support.sidecar_engine import Engine, wait_until

ROOT = Path(__file__).parents[3]


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def umask_of(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("Umask:"))


def test_files_of_the_data_folder_are_the_owners_only_after_a_run(
    open_umask: None, tmp_path: Path
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    environment = {**os.environ, "AURORA_HOME": str(home), "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "aurora_sgl.cli"]
    subprocess.run([*run, "db", "upgrade"], env=environment, check=True, capture_output=True)
    supervisor = SidecarSupervisor(Settings(home=home), endpoint)  # as SGLang's process does
    supervisor.start()
    scheduler = subprocess.Popen([*run, "scheduler"], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: ": ready: " in supervisor.log_path.read_text(), 30)
        assert umask_of(supervisor.pid) == "0077"
        engine = Engine(endpoint, BOOT)
        engine.run()
        house = House(send=Channel(endpoint, BOOT, 100).send_traces)
        house.started = lambda number: engine.send(samples.started(number, boot_id=BOOT))
        serve(house, 20, 4)
        wait_until(lambda: list(home.glob("artifacts/traces/*/*.safetensors")), 60, "a trace")
        wait_until(lambda: umask_of(scheduler.pid) == "0077", 30, "the scheduler")
        names = {path.relative_to(home).parts[0] for path in home.rglob("*")}
        assert {"aurora.db", "aurora.db-wal", "artifacts", "spool", "logs", "tmp"} <= names
        for top in (home, endpoint):
            for path in (top, *top.rglob("*")):
                mode = stat.S_IMODE(path.lstat().st_mode)
                if not path.is_socket():  # whoever can't enter the folder can't connect
                    assert mode == (0o700 if path.is_dir() else 0o600), f"{path} {mode:o}"
        house.close()
        engine.close()
    finally:
        scheduler.terminate()
        supervisor.stop()
        psutil.Process(scheduler.pid).wait(20)
        scheduler.wait()
