"""A ring of shared memory through which rows of hidden states go from an engine to its sidecar.

The engine writes rows and says over ZeroMQ where they lie; the sidecar copies them out and frees
them, in the order in which they were written. Positions count bytes since the start and never go
back; a row's place is its position modulo the size. The memory has no name in any folder: the
sidecar opens it by way of ``/proc``, and when both processes are gone, however they ended, it is
gone too. Nor does it count against the size of ``/dev/shm``, which containers keep small.

Page 0 holds two counters that the reader alone writes, each with one store of 8 bytes: ``freed``,
the position up to which it has copied everything, and ``waiting``, the bytes of whole traces that
it holds and has not written to the disk yet.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re

import numpy as np
from numpy.typing import NDArray

_PAGE = 4096
_FREED, _WAITING = 0, 1
_PATH = re.compile(r"/proc/\d+/fd/\d+")


class RingWriter:
    """The engine's end; one thread writes."""

    def __init__(self, size: int) -> None:
        """``size``: bytes of rows. Raises ``OSError`` when there is no memory for it."""
        self.size = size
        self.head = 0  # position of the next byte
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        self._fd = os.memfd_create("aurora-traces", flags)
        try:
            os.posix_fallocate(self._fd, 0, _PAGE + size)  # now, not as a SIGBUS later
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._map = mmap.mmap(self._fd, _PAGE + size)
        except BaseException:
            os.close(self._fd)
            raise
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._counters = np.frombuffer(self._map, np.uint64, _PAGE // 8)
        self._bytes = np.frombuffer(self._map, np.uint8, size, _PAGE)

    @property
    def freed(self) -> int:
        """Position up to which the reader has everything."""
        return min(int(self._counters[_FREED]), self.head)

    @property
    def waiting(self) -> int:
        """Bytes of whole traces that the reader has not written yet."""
        return int(self._counters[_WAITING])

    @property
    def largest(self) -> int:
        """Bytes that can be asked for at once: what always fits into an empty ring."""
        return self.size // 4

    def allocate(self, count: int) -> int | None:
        """The position of ``count`` bytes in a row, or None while there is no room for them."""
        assert count <= self.size // 2, count
        rest = self.size - self.head % self.size
        position = self.head if count <= rest else self.head + rest
        if position + count - self.freed > self.size:
            return None
        self.head = position + count
        return position

    def give_back(self, position: int) -> None:
        """Undo the latest :meth:`allocate`, which the reader was told nothing of."""
        self.head = position

    def rows(
        self, position: int, count: int, width: int
    ) -> NDArray[np.uint8]:  # shape: [count, width]
        """Where ``count`` rows of ``width`` bytes go."""
        first = position % self.size
        return self._bytes[first : first + count * width].reshape(count, width)

    def close(self) -> None:
        """Rows that were handed out must be gone."""
        del self._bytes, self._counters
        self._map.close()
        os.close(self._fd)


class RingReader:
    """The sidecar's end; one thread reads."""

    def __init__(self, path: str) -> None:
        """Raises ``OSError`` or ``ValueError`` for what is no ring."""
        if not _PATH.fullmatch(path):
            raise ValueError(f"not a ring: {path[:80]}")
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        self.size = len(self._map) - _PAGE
        self._counters = memoryview(self._map)[:_PAGE].cast("Q")

    def read(self, position: int, count: int) -> bytes:
        """A copy. Raises ``ValueError`` for a place that is not in the ring."""
        if count == 0:
            return b""
        first = position % self.size if self.size > 0 else 0
        if position < 0 or count < 0 or first + count > self.size:
            raise ValueError(f"{count} bytes at {position} are not in a ring of {self.size}")
        return self._map[_PAGE + first : _PAGE + first + count]

    def free(self, position: int) -> None:
        self._counters[_FREED] = max(position, 0)

    def report(self, waiting: int) -> None:
        self._counters[_WAITING] = max(waiting, 0)

    def close(self) -> None:
        self._counters.release()
        self._map.close()
