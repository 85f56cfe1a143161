"""A disk without room: a real one, a small tmpfs, where this process may mount it; or calls that
fail as they do there."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest


class Disk(Protocol):
    folder: Path

    def fill(self) -> None: ...
    def clear(self) -> None: ...


class SmallDisk:
    """A tmpfs of one MiB; a file takes all the room that is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        with suppress(OSError), (self.folder / "filler").open("ab", buffering=0) as file:
            for size in (1 << 12, 1):
                while file.write(b"x" * size) == size:
                    pass

    def clear(self) -> None:
        (self.folder / "filler").unlink()


class FailingCalls:
    """Every write of this process fails as on a full disk, and so does a new file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._full = False
        open_, pwrite, write = os.open, os.pwrite, os.write

        def new_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_CREAT and not os.path.exists(path):
                self._check()
            return open_(path, flags, *rest, **more)

        def new_pwrite(fd: int, data: bytes, offset: int) -> int:
            self._check()
            return pwrite(fd, data, offset)

        def new_write(fd: int, data: bytes) -> int:
            if os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(folder)):
                self._check()
            return write(fd, data)

        for name, call in (("open", new_open), ("pwrite", new_pwrite), ("write", new_write)):
            monkeypatch.setattr(os, name, call)

    def _check(self) -> None:
        if self._full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(self) -> None:
        self._full = True

    def clear(self) -> None:
        self._full = False


@contextmanager
def small_disk(place: Path) -> Iterator[SmallDisk]:
    """Skips the test where nothing may be mounted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, check=False, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount")
    if done.returncode:
        pytest.skip(f"nothing may be mounted here: {done.stderr.decode().strip()}")
    try:
        yield SmallDisk(place)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.fixture(name="disk", params=["tmpfs", "failing calls"])
def full_disk(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Disk]:
    if request.param == "tmpfs":
        with small_disk(tmp_path / "disk") as mounted:
            yield mounted
    else:
        (tmp_path / "disk").mkdir()
        yield FailingCalls(tmp_path / "disk", monkeypatch)
