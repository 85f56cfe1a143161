"""The operator's web page beside the demo: a process of its own that steps far back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from aurora_sgl.environment import EXIT_WITH_PARENT, LOG_FORMAT
from aurora_sgl.private import make_folder, opener
from aurora_sgl.processes.server import port_is_free

PORT, NICENESS, STOP_SECONDS = 8501, 15, 10.0


class DashboardProcess:
    """``aurora-sgl dashboard``; what it prints (its address, a link for the first login) is said
    through ``say``. It ends with this process, and the demo goes on without it."""

    def __init__(self, log: Path, say: Callable[[str], None]) -> None:
        self._log, self._say = log, say
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        port = PORT if port_is_free("127.0.0.1", PORT) else 0
        command = [sys.executable, "-m", "aurora_sgl.cli", "dashboard"]
        make_folder(self._log.parent)
        with open(self._log, "ab", opener=opener) as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(port), "--nice", str(NICENESS)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={
                    **os.environ,
                    EXIT_WITH_PARENT: "1",
                    LOG_FORMAT: "text",  # its address is read from a line for people
                    "OMP_NUM_THREADS": "1",
                },
                start_new_session=True,
            )
        threading.Thread(target=self._pass_on, name="aurora-dashboard", daemon=True).start()

    def _pass_on(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        has_address = False
        for line in process.stdout:
            has_address = has_address or line.startswith("dashboard:")
            self._say(line.strip())
        if not has_address:
            self._say(f"the dashboard did not start (log: {self._log})")

    def stop(self) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
