"""The sidecars beside this server, one for each data-parallel rank: started by the process that
takes HTTP requests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from aurora_sgl import environment
from aurora_sgl.config import get_settings

_supervisors: list[Any] = []


def start(dp_size: int) -> None:
    """Start the sidecars and tell the schedulers, which are spawned later, where they listen."""
    settings = get_settings()
    if not settings.record or _supervisors:
        return
    from aurora_sgl.sidecar.supervisor import SidecarSupervisor

    base = Path(tempfile.mkdtemp(prefix="aurora-"))  # ipc paths are limited to 107 bytes
    os.environ[environment.ENDPOINT] = str(base)
    for rank in range(dp_size):
        supervisor = SidecarSupervisor(settings, base / str(rank))
        supervisor.start()
        _supervisors.append(supervisor)
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    atexit.register(stop)


def stop() -> None:
    """Let the sidecars take what they were sent, and end them."""
    while _supervisors:
        _supervisors.pop().stop()
