"""How a process, or a piece of work, that serves nobody steps back behind those that do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_AUTOGROUP = Path("/proc/self/autogroup")
#: Linux refuses (EAGAIN) all such writes, of whatever process, within a tenth of a second of the
#: last one, except to those with CAP_SYS_ADMIN.
_TRIES, _SECONDS = 10, 0.12


def step_back(niceness: int) -> None:
    """Lower this process's share of the CPU, also against processes of other sessions.

    Linux with autogroups (the default of desktop and many server kernels) shares the CPU between
    *sessions* first and heeds niceness only within one: a trainer in a session of its own takes as
    much as the server, whatever its niceness. So the session's group gets the niceness as well,
    when this process is the one that leads it; the group of a shell or of a server is left alone.
    """
    os.nice(niceness)
    if os.getsid(0) == os.getpid():
        _set_autogroup(min(19, niceness))


def _set_autogroup(niceness: int) -> None:
    for _ in range(_TRIES):
        try:
            _AUTOGROUP.write_text(str(niceness))
            return
        except BlockingIOError:
            time.sleep(_SECONDS)
        except OSError:  # not Linux, or no autogroups
            return


def when_idle(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of Linux's idle class and wait for it; its errors are raised here.

    A CPU that runs only such threads counts as free when the kernel looks for one to wake a
    process on, so a decode step never waits for it. An ordinary niceness does not have that: over
    50 swaps on two cores the longest gap of a stream was 1.5 median steps with the idle class,
    3.1 without. A thread of its own, because an ordinary user's thread can't leave the class.
    """
    done: Future[T] = Future()

    def run() -> None:
        with suppress(OSError, AttributeError):  # not Linux
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="aurora-idle", daemon=True).start()
    return done.result()
