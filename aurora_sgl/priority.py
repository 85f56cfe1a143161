"""How a process that serves nobody steps back behind those that do."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_AUTOGROUP = Path("/proc/self/autogroup")


def step_back(niceness: int) -> None:
    """Lower this process's share of the CPU, also against processes of other sessions.

    Linux with autogroups (the default of desktop and many server kernels) shares the CPU between
    *sessions* first and heeds niceness only within one: a trainer in a session of its own takes as
    much as the server, whatever its niceness. So the session's group gets the niceness as well,
    when this process is the one that leads it; the group of a shell or of a server is left alone.
    """
    os.nice(niceness)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):  # not Linux, or no autogroups
            _AUTOGROUP.write_text(str(min(19, niceness)))
