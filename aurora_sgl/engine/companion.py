"""The sidecar beside this server: started by the process that takes HTTP requests."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from aurora_sgl.config import get_settings

ENDPOINT_VARIABLE = "AURORA_ENDPOINT"

_supervisor: Any = None


def start() -> None:
    """Start the sidecar and tell the schedulers, which are spawned later, where it listens."""
    global _supervisor
    settings = get_settings()
    if not settings.record or _supervisor is not None:
        return
    from aurora_sgl.sidecar.supervisor import SidecarSupervisor

    endpoint = Path(tempfile.mkdtemp(prefix="aurora-"))  # ipc paths are limited to 107 bytes
    os.environ[ENDPOINT_VARIABLE] = str(endpoint)
    _supervisor = SidecarSupervisor(settings, endpoint)
    _supervisor.start()
    atexit.register(shutil.rmtree, endpoint, ignore_errors=True)
    atexit.register(stop)


def exit_with_parent() -> None:
    """End this server, as by SIGTERM, when the process that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20.0)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="aurora-parent-watch", daemon=True).start()


def stop() -> None:
    """Let the sidecar take what it was sent, and end it."""
    global _supervisor
    if _supervisor is not None:
        _supervisor.stop()
        _supervisor = None
