"""The sidecars beside this server, one for each data-parallel rank: started by the process that
takes HTTP requests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aurora_sgl import environment
from aurora_sgl.config import Settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.endpoint import NAMES, address

_supervisors: list[Any] = []

#: Where the sockets lie when the folder for temporary files has too long a name, or none.
_SHORT = ("/tmp", "/dev/shm", "/var/tmp")


def start(dp_size: int, settings: Settings) -> None:
    """Start the sidecars and tell the schedulers, which are spawned later, where they listen.

    Raises ``AuroraError`` when they can't be started; then none runs, and nothing is told.
    """
    if _supervisors:
        return
    from aurora_sgl.sidecar.supervisor import SidecarSupervisor

    base = socket_folder(dp_size)
    try:
        for rank in range(dp_size):
            supervisor = SidecarSupervisor(settings, base / str(rank), rank)
            supervisor.start()
            _supervisors.append(supervisor)
    except BaseException:
        stop()
        shutil.rmtree(base, ignore_errors=True)
        raise
    os.environ[environment.ENDPOINT] = str(base)
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    atexit.register(stop)


def misunderstood(url: str) -> str:
    """Why no store can be at this URL; "" when one can."""
    from aurora_sgl.store.connection import parse_url

    try:
        parse_url(url)
    except AuroraError as error:
        return str(error)
    return ""


def socket_folder(dp_size: int) -> Path:
    """A new private folder whose name is short enough for sockets in it.

    Raises ``AuroraError`` when there is none.
    """
    wrong = ""
    for parent in (None, *_SHORT):
        try:
            folder = Path(tempfile.mkdtemp(prefix="aurora-", dir=parent))  # mode 700
        except OSError as error:
            wrong = wrong or f"no folder for sockets can be made: {error}"
            continue
        try:
            for name in NAMES:
                address(folder / str(dp_size), name)
        except AuroraError as error:
            wrong = wrong or str(error)
            folder.rmdir()
            continue
        return folder
    raise AuroraError(wrong)


def stop_first(original: Callable[..., Any], parent_pid: Any, *args: Any, **kw: Any) -> Any:
    """Around that with which SGLang ends its processes, after SIGTERM or when one of them failed:
    it kills every child of this process, and the sidecars are some."""
    if parent_pid == os.getpid():
        stop()
    return original(parent_pid, *args, **kw)


def stop() -> None:
    """Let the sidecars take what they were sent, and end them."""
    while _supervisors:
        _supervisors.pop().stop()
