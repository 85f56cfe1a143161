"""Files and folders that a reader sees whole or not at all: written beside their place, then
renamed into it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def beside(place: Path) -> Path:
    """A hidden name of its own in the same folder, so that renaming it stays on one disk."""
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")


@contextmanager
def written(place: Path) -> Iterator[Path]:
    """Gives a path beside ``place``; what the block leaves there, a file or a folder, takes its
    place. If the block fails, ``place`` is as before and nothing is left beside it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    new = beside(place)
    try:
        yield new
        swap(new, place)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):
            new.unlink()
        raise


def replace_file(place: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file and have it on the disk before it takes its place, and its place before this
    returns: a power cut brings back neither an empty file nor the old one. ``mode`` less the
    umask."""
    with written(place) as new:
        descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk: what was made, renamed or removed there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def swap(new: Path, place: Path) -> None:
    """Rename ``new`` to ``place``. A folder that was there goes after the new one stands."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_dir() or place.is_symlink():
        os.replace(new, place)
        return
    old = beside(place)
    os.rename(place, old)
    os.rename(new, place)
    shutil.rmtree(old, ignore_errors=True)
