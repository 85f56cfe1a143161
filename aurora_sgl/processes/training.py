"""Training runs in processes of their own: started, listened to, paused and ended.

A run writes its progress to stderr, a JSON object a line, and its outcome to stdout, see
``training.run.Outcome``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from aurora_sgl.private import make_folder, opener

MODULE = "aurora_sgl.training"
#: Last words of a run that are looked for its outcome.
_TAIL_BYTES = 4000
#: Seconds between asking a run to end and ending it.
GRACE_SECONDS = 3.0
#: Seconds that a busy machine may take to stop a process.
STILL_SECONDS = 0.5

log = logging.getLogger(__name__)


def event_in(line: str) -> dict[str, Any] | None:
    """The JSON object that a line of a run is; ``None`` for anything else."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def failed(code: int, last_words: str) -> dict[str, Any]:
    """The outcome of a run that left none."""
    return {"status": "failed", "error": f"the trainer ended with {code}: {last_words}"}


def start_detached(arguments: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """A run that outlives the thread that starts it; all that it says goes into a file, see
    :func:`outcome_in`. Raises ``OSError`` when the system has no room for it."""
    make_folder(output.parent)
    with open(output, "wb", opener=opener) as file:
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def outcome_in(output: Path, code: int) -> dict[str, Any]:
    """What a run came to that ended with this code and whose words went into a file."""
    lines = output.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
    for line in reversed(lines):
        event = event_in(line)
        if event is not None and "status" in event:
            return event
    return failed(code, lines[-1] if lines else "without a word")


class TrainingProcess:
    """``python -m MODULE`` in a session of its own. Ends with this process, also when
    that is killed. Use it from one thread, which must live as long as it."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        module: str = MODULE,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Starts it. ``on_event`` is called with its progress, in a thread. Raises ``OSError`` when
        the system has no room for it."""
        self.started = time.monotonic()
        self.progress: dict[str, Any] = {}
        self.stopped_because = ""
        self._on_event = on_event
        self._stop_at = 0.0
        self._last_words = ""
        self._paused_at: float | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aurora_sgl.processes.bound_to_parent", str(os.getpid()),
             module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        self._output: list[bytes] = []
        self._readers = [
            threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True),
            threading.Thread(target=self._collect, args=(self._process.stdout,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def paused(self) -> bool:
        return self._paused_at is not None

    def _listen(self, lines: IO[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace").strip()
            event = event_in(text)
            if event is None:
                self._last_words = text or self._last_words
                continue
            self.progress = event
            if self._on_event is not None:
                self._on_event(event)

    def _collect(self, output: IO[bytes]) -> None:
        self._output.append(output.read())

    def outcome(self) -> dict[str, Any] | None:
        """What it came to, as ``training.run.Outcome`` in JSON; ``None`` while it runs. One that
        was asked to end and does not is killed."""
        code = self._process.poll()
        if code is None:
            if self._stop_at and time.monotonic() > self._stop_at + GRACE_SECONDS:
                self._signal(signal.SIGKILL)
            return None
        for reader in self._readers:
            reader.join(5.0)
        outcome = event_in(b"".join(self._output).decode(errors="replace"))
        if outcome is not None:
            return outcome
        if self.stopped_because:
            return {"status": "failed", "error": self.stopped_because}
        return failed(code, self._last_words)

    def pause(self) -> None:
        """Stop it where it is; returns when it stands still."""
        if self.paused:
            return
        self._signal(signal.SIGSTOP)
        self._paused_at = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            while time.monotonic() < self._paused_at + STILL_SECONDS and (
                psutil.Process(self.pid).status() != psutil.STATUS_STOPPED
            ):
                time.sleep(0.005)

    def resume(self) -> None:
        if self.paused:
            self._signal(signal.SIGCONT)
            self._paused_at = None

    def stop(self, why: str) -> None:
        """Ask it to end; :meth:`outcome` sees to it that it does."""
        if not self._stop_at:
            self.stopped_because, self._stop_at = why, time.monotonic()
            self._signal(signal.SIGTERM)
            self.resume()  # a stopped process takes no signal

    def end(self) -> None:
        """End it now and wait for that."""
        self.stop("what started it ended")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
