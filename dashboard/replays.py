"""Replays of single requests that were asked for on a page: each in a process of its own, at low
priority, with limits of time and memory (``evaluation.one_request``)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import IO, Any

from aurora_sgl.evaluation.one_request import SECONDS, PairTask

MODULE = "aurora_sgl.evaluation.one_request"
#: Seconds for which an outcome is kept, and how many are.
KEPT_SECONDS, MOST_KEPT = 600.0, 20


@dataclass(frozen=True)
class ReplayOutcome:
    """``answer``: as ``one_request.SteppedRequest`` in JSON; else ``error`` says why there is
    none."""

    answer: Mapping[str, Any] | None
    error: str = ""
    moment: float = field(default_factory=time.monotonic)


@dataclass
class _Running:
    task: PairTask
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    started: float


class RequestReplays:
    """At most one runs at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: _Running | None = None
        self._outcomes: OrderedDict[PairTask, ReplayOutcome] = OrderedDict()

    def start(self, task: PairTask) -> bool:
        """False: another one still goes on."""
        with self._lock:
            self._look()
            if self._running is not None:
                return False
            self._outcomes.pop(task, None)
            # Tokens may stand in it: nobody else can open it.
            output = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it was read)
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
            )  # of our session: in one of its own a busy machine gives it next to nothing
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(json.dumps(asdict(task)).encode())
            self._running = _Running(task, process, output, time.monotonic())
            return True

    def seconds(self, task: PairTask) -> float | None:
        """For how long it goes on; ``None``: it does not."""
        with self._lock:
            self._look()
            running = self._running
            return time.monotonic() - running.started if running and running.task == task else None

    def outcome(self, task: PairTask) -> ReplayOutcome | None:
        with self._lock:
            self._look()
            return self._outcomes.get(task)

    def stop_all(self) -> None:
        with self._lock:
            if self._running is not None:
                self._running.process.kill()
                self._running.process.wait()

    def _look(self) -> None:
        oldest = time.monotonic() - KEPT_SECONDS
        for task in [task for task, outcome in self._outcomes.items() if outcome.moment < oldest]:
            del self._outcomes[task]
        running = self._running
        if running is None or running.process.poll() is None:
            return
        self._running = None
        with running.output as output:
            output.seek(0)
            self._outcomes[running.task] = _outcome(running.process.returncode, output.read())
        while len(self._outcomes) > MOST_KEPT:
            self._outcomes.popitem(last=False)


def _outcome(code: int, output: bytes) -> ReplayOutcome:
    if -code in (signal.SIGALRM, signal.SIGXCPU):
        return ReplayOutcome(None, f"stopped: it took more than {SECONDS:.0f} s")
    try:
        answer = json.loads(output)
    except ValueError:
        return ReplayOutcome(
            None, f"the process that replayed it ended without an answer (code {code})"
        )
    return ReplayOutcome(None, str(answer["error"])) if "error" in answer else ReplayOutcome(answer)


ALL = RequestReplays()


def stop_all() -> None:
    ALL.stop_all()
