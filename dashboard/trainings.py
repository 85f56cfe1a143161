"""Training runs that were started from the page: each a process in a session of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from aurora_sgl.config import get_settings
from aurora_sgl.processes.training import outcome_in, start_detached


@dataclass(frozen=True)
class Ended:
    """How the last run that was started here came out. ``error``: one line, or empty."""

    status: str
    error: str


class Trainings:
    """At most one of each group; the store's lease holds off those from elsewhere."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        self._ended: dict[str, Ended] = {}

    def start(self, group: str) -> bool:
        """Start one; False when one that was started here is still going on."""
        with self._lock:
            if self._is_running(group):
                return False
            self._ended.pop(group, None)
            log = get_settings().home.resolve() / "logs" / "dashboard-training.log"
            process = start_detached(["--group", group, "--trigger", "dashboard"], log)
            self._running[group] = (process, log)
            return True

    def is_running(self, group: str) -> bool:
        with self._lock:
            return self._is_running(group)

    def ended(self, group: str) -> Ended | None:
        """``None``: none was started here, or it goes on."""
        with self._lock:
            self._is_running(group)
            return self._ended.get(group)

    def _is_running(self, group: str) -> bool:
        process, log = self._running.get(group, (None, None))
        if process is None or log is None:
            return False
        code = process.poll()
        if code is None:
            return True
        del self._running[group]
        outcome = outcome_in(log, code)
        self._ended[group] = Ended(str(outcome["status"]), str(outcome.get("error", "")))
        return False

    def stop_all(self) -> None:
        with self._lock:
            for process, _ in self._running.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            for process, _ in self._running.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)


ALL = Trainings()


def stop_all() -> None:
    ALL.stop_all()
