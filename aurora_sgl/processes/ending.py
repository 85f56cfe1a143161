"""Waiting for the end of a process that a signal asks for, once or many times."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress


class Ending:
    """An end that signal handlers ask for and others wait for.

    A ``threading.Event`` won't do: its lock is not reentrant. Whoever sends SIGTERM twice (a
    supervisor and a person, say) may meet the thread that wakes up from the first one, which holds
    the lock that the second handler, in the same thread, then waits for without an end.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """Readable once an end was asked for, and from then on."""
        return self._read

    def ask(self, *_: object) -> None:
        """Safe in a signal handler and from any thread."""
        with suppress(BlockingIOError):  # asked for by so many that the pipe is full
            os.write(self._write, b"x")

    def on_signals(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, self.ask)

    def wait(self, seconds: float | None = None) -> bool:
        """Whether an end was asked for, now or within ``seconds`` (None: wait for it)."""
        return bool(select.select([self._read], [], [], seconds)[0])

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)
