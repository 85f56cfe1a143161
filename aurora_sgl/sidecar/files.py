"""A lock on a folder that survives a kill at any instruction."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from aurora_sgl.errors import AuroraError
from aurora_sgl.private import denied, make_folder


class FolderLock:
    """An exclusive lock on a folder, held until :meth:`release` or the death of the process."""

    def __init__(self, folder: Path, what: str) -> None:
        """Raises ``AuroraError`` when another process holds it, or the folder can't be written."""
        self.path = folder / "lock"
        try:
            make_folder(folder)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise AuroraError(
                f"can't write to {folder}: {denied(error)}; "
                "choose another (AURORA_HOME: the data folder)"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise AuroraError(
                f"another sidecar (process {holder}) uses {what} {folder}; stop it first"
            ) from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
