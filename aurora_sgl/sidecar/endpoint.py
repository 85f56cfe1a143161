"""The three sockets between the engine and the sidecar, as files of one folder.

``records`` and ``traces`` are PULL here and PUSH in the engine; ``commands`` is PUSH here and
PULL in the engine. The sidecar binds and the engine connects, so that a restarted sidecar finds
the same engine again. A PUSH socket that no engine has joined refuses, and so tells us that.
"""

from __future__ import annotations

import os
from pathlib import Path

import zmq

from aurora_sgl import wire
from aurora_sgl.errors import AuroraError
from aurora_sgl.private import OWNER
from aurora_sgl.sidecar.files import FolderLock

NAMES = ("records", "traces", "commands")
#: The file beside them that has the address of ``/health`` and ``/metrics``.
HEALTH_FILE = "health.json"

#: A Unix socket's path has room for 108 bytes with the closing zero (sys/un.h on Linux).
MAX_PATH = 107


def address(folder: Path, name: str) -> str:
    """The ZeroMQ address of one socket.

    Raises ``AuroraError`` when its path is longer than the system allows.
    """
    path = os.fspath((folder / name).absolute())
    if len(os.fsencode(path)) > MAX_PATH:
        raise AuroraError(
            f"the socket path {path} is longer than {MAX_PATH} bytes; choose a shorter folder"
        )
    return f"ipc://{path}"


class Endpoint:
    """The sidecar's side. One thread receives; :meth:`send` may be called by another."""

    def __init__(self, folder: Path) -> None:
        """Raises ``AuroraError``: path too long, folder in use, or not writable."""
        addresses = {name: address(folder, name) for name in NAMES}
        self._lock = FolderLock(folder, "the endpoint")
        self.context = zmq.Context()
        self.records = self.context.socket(zmq.PULL)
        self.traces = self.context.socket(zmq.PULL)
        self.commands = self.context.socket(zmq.PUSH)
        self.records.rcvhwm = 1000
        self.traces.rcvhwm = 16  # a chunk may have megabytes
        self.commands.sndhwm = 100
        for name in NAMES:
            socket = getattr(self, name)
            socket.linger = 0
            try:
                socket.bind(addresses[name])
                (folder / name).chmod(OWNER.file)  # also in a folder that is open to others
            except (zmq.ZMQError, OSError) as error:
                self.close()
                raise AuroraError(
                    f"can't listen on {addresses[name]}: {error}; choose another folder"
                ) from error

    def send(self, command: wire.Command) -> bool:
        """Send without waiting. False when no engine is there to take it."""
        try:
            self.commands.send(wire.encode(command), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self.context.destroy(linger=0)
        self._lock.release()
