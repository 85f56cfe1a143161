"""How a process that serves nobody steps back behind those that do."""

from __future__ import annotations

import os
import time
from pathlib import Path

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
