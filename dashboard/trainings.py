"""Training runs that were started from the page: each a process in a session of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from aurora_sgl.config import get_settings

#: Last words of a run that are looked for a reason.
TAIL_BYTES = 4000


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
            log.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "aurora_sgl.training", "--group", group]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [*command, "--trigger", "dashboard"],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
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
        self._ended[group] = _outcome(code, log)
        return False

    def stop_all(self) -> None:
        with self._lock:
            for process, _ in self._running.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            for process, _ in self._running.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)


def _outcome(code: int, log: Path) -> Ended:
    lines = log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip().splitlines()
    for line in reversed(lines):
        with suppress(ValueError):
            said: Any = json.loads(line)
            if isinstance(said, dict) and "status" in said:
                return Ended(str(said["status"]), str(said.get("error", "")))
    return Ended("failed", f"it ended with {code}: {lines[-1] if lines else 'without a word'}")


ALL = Trainings()


def stop_all() -> None:
    ALL.stop_all()
