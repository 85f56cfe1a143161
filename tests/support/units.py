"""Processes as the units of deploy/systemd start them, with the environment they would have."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from tests.support.sidecar_engine import wait_until

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"


def exec_start(unit: str, environment: Mapping[str, str]) -> list[str]:
    """What a unit runs, its variables filled in as systemd does: ``${X}`` is one word, ``$X`` as
    many as it has."""
    lines = (UNITS / unit).read_text().splitlines()
    line = next(line for line in lines if line.startswith("ExecStart="))
    words: list[str] = []
    for word in shlex.split(line.removeprefix("ExecStart=")):
        if word.startswith("${"):
            words.append(environment[word[2:-1]])
        elif word.startswith("$"):
            words += shlex.split(environment.get(word[1:], ""))
        else:
            words.append(word)
    assert words[0].endswith("/bin/aurora-sgl"), line
    return [str(Path(sys.executable).parent / "aurora-sgl"), *words[1:]]


class Service:
    """One long-running process that can be killed and started again, and its log."""

    def __init__(
        self, name: str, command: list[str], log: Path, environment: Mapping[str, str], ready: str
    ) -> None:
        """``ready``: an address that answers 200 once it is."""
        self.name, self.ready = name, ready
        self._command, self._log = command, log
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("AURORA_")},
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # killed with all that it started, as a unit is
            )

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended:\n{self.text()[-3000:]}"
        try:
            return httpx.get(self.ready, timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_ready(self, seconds: float = 300) -> None:
        wait_until(self.is_ready, seconds, f"{self.name} ready:\n{self.text()[-2000:]}")

    def kill(self) -> None:
        """As ``systemctl kill --signal=KILL``: the whole unit."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> int | None:
        """As ``systemctl stop``; its exit code, or None when it had to be killed."""
        if self.process is None or self.process.poll() is not None:
            return None if self.process is None else self.process.returncode
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            return None
        finally:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                try:
                    os.killpg(self.process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    break
                time.sleep(0.2)
