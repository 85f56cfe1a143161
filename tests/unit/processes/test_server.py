"""A server that does not come up says where it stands; nothing else is ended by the question."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from aurora_sgl.processes.server import ServerProcess

#: Its child has no handler, so that the signal would end it.
SCRIPT = """
import faulthandler, signal, subprocess, sys, time
faulthandler.register(signal.SIGUSR2, all_threads=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("up", flush=True)
def stands_here():
    time.sleep(60)
stands_here()
"""


def test_a_server_that_hangs_writes_where_its_threads_stand_and_its_sidecars_live_on(
    tmp_path: Path,
) -> None:
    server = ServerProcess([], port=1, log=tmp_path / "server.log", environment={})
    with server.log.open("wb") as log:
        server._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT], stdout=log, stderr=log, start_new_session=True
        )
    try:
        begun = time.monotonic()
        while "up" not in server.log_tail() and time.monotonic() < begun + 30:
            time.sleep(0.05)
        server.dump_threads()
        assert "stands_here" in server.log_tail()
        assert len(server.family()) == 2
        assert all(one.status() != psutil.STATUS_ZOMBIE for one in server.family())
    finally:
        server.stop()
    assert server.family() == []
