"""The artifact root: weights and traces as files under one fsspec URL, named by relative URIs.

Everything is written beside its place, checked by size or hash and renamed, so a reader sees the
whole file or none. In an object store a rename is a copy, and a folder appears file by file;
there ``config.json`` comes last, so that a folder with one is whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec

from aurora_sgl import atomic, litter
from aurora_sgl.config import get_settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_file
from aurora_sgl.private import access_to_artifacts, make_folder, opener

_PIECE = 1 << 20
_LAST = "config.json"
#: Folders of the root that are ours.
FOLDERS = ("traces", "versions")


class ArtifactRoot:
    """Files under ``url`` (default: the settings' root); URIs are relative, with slashes."""

    def __init__(self, url: str | None = None) -> None:
        self.url = url or get_settings().artifact_root
        self._access = access_to_artifacts(get_settings().artifact_access)
        try:
            fs, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise AuroraError(f"AURORA_ARTIFACTS {self.url!r} can't be used: {error}") from None
        self._fs: Any = fs
        self._path = str(path).rstrip("/")
        protocols = fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)
        self.is_local = "file" in protocols

    def local_path(self, uri: str) -> Path | None:
        """The path of an artifact when the root is a folder of this machine, else ``None``."""
        return Path(self._full(uri)) if self.is_local else None

    def exists(self, uri: str) -> bool:
        """A folder of weights exists when its last file does."""
        full = self._full(uri)
        if uri.endswith("/") and not self.is_local:
            full = f"{full}/{_LAST}"
        with self._errors(f"look for {uri}"):
            return bool(self._fs.exists(full))

    def size(self, uri: str) -> int:
        """Bytes of a file."""
        with self._errors(f"look at {uri}"):
            return int(self._fs.size(self._full(uri)))

    def open(self, uri: str) -> IO[bytes]:
        """A file for reading; close it, or use it in ``with``."""
        with self._errors(f"read {uri}"):
            file: IO[bytes] = self._fs.open(self._full(uri), "rb")
            return file

    def put_file(self, local: Path, uri: str) -> str:
        """Copy a local file; returns its SHA-256. An older file of that name is replaced."""
        with self._errors(f"write {uri}"):
            return self._put(Path(local), self._full(uri))

    def put_folder(self, local: Path, uri: str) -> dict[str, str]:
        """Copy the files of a local folder, without those in folders below it; the SHA-256 of
        each by name. Every copy is read back and compared. A folder that exists stays as it is
        when it holds the same files, otherwise it is replaced."""
        names = sorted(path.name for path in Path(local).iterdir() if path.is_file())
        names.sort(key=lambda name: name == _LAST)
        if not names:
            raise AuroraError(f"{local} holds no files")
        hashes = {name: sha256_file(Path(local) / name) for name in names}
        full = self._full(uri)
        with self._errors(f"write {uri}"):
            if self._holds(full, hashes):
                return hashes
            target = _beside(full) if self.is_local else full
            try:
                for name in names:
                    self._put(Path(local) / name, f"{target}/{name}")
                if not self._holds(target, hashes):
                    raise OSError(errno.EIO, "the copy differs from what was written")
                if self.is_local:
                    atomic.swap(Path(target), Path(full))
            except BaseException:
                if self.is_local:
                    shutil.rmtree(target, ignore_errors=True)
                raise
        return hashes

    def fetch_folder(self, uri: str, into: Path) -> Path:
        """Copy a folder of artifacts to the local folder ``into``, whole or not at all."""
        into = Path(into)
        with self._errors(f"fetch {uri}"), atomic.written(into) as new:
            new.mkdir()
            for path in self._fs.ls(self._full(uri), detail=False):
                self._fs.get_file(path, str(new / PurePosixPath(path).name))
        return into

    def delete(self, uri: str) -> None:
        """Delete a file, or a folder with all in it; nothing happens when it isn't there."""
        full = self._full(uri)
        with self._errors(f"delete {uri}"), suppress(FileNotFoundError):
            self._fs.rm(full, recursive=True)

    def sweep(self) -> int:
        """Delete what killed processes left half written, see ``litter``; how many files and
        folders."""
        if self.is_local:
            return sum(litter.sweep(Path(self._full(folder))) for folder in FOLDERS)
        files = chain.from_iterable(map(self.files, FOLDERS))
        left = [uri for uri, age in files if litter.is_left(uri.rpartition("/")[2], age)]
        for uri in left:
            self.delete(uri)
        return len(left)

    def files(self, folder: str) -> Iterator[tuple[str, float]]:
        """URIs of the files below a folder, and the seconds since each was written: 0 where nobody
        knows."""
        now = time.time()
        with self._errors(f"list {folder}"):
            try:
                infos = self._fs.find(self._full(folder), detail=True)
            except FileNotFoundError:
                return
        for path, info in infos.items():
            written = _time_of(info)
            age = 0.0 if written is None else now - written
            yield str(path)[len(self._path) :].lstrip("/"), age

    def _full(self, uri: str) -> str:
        parts = PurePosixPath(uri).parts
        if not parts or uri.startswith("/") or ".." in parts:
            raise AuroraError(f"{uri!r} is not a path inside of the artifact root")
        return f"{self._path}/{'/'.join(parts)}"

    def _put(self, local: Path, full: str) -> str:
        """Copy one file beside ``full``, check its size and rename it."""
        beside = _beside(full)
        digest = hashlib.sha256()
        self._make_folder(full.rpartition("/")[0])
        try:
            with local.open("rb") as source, self._new_file(beside) as copy:
                while piece := source.read(_PIECE):
                    digest.update(piece)
                    copy.write(piece)
                if self.is_local:
                    copy.flush()
                    os.fsync(copy.fileno())
            if self._fs.size(beside) != local.stat().st_size:
                raise OSError(errno.EIO, "the copy is shorter than the file")
            if self.is_local:
                os.replace(beside, full)
            else:
                self._fs.mv(beside, full)
        except BaseException:
            with suppress(OSError):
                self._fs.rm(beside)
            raise
        return digest.hexdigest()

    def _make_folder(self, full: str) -> None:
        if self.is_local:
            make_folder(Path(full), self._access)
        else:
            self._fs.makedirs(full, exist_ok=True)

    def _new_file(self, full: str) -> IO[bytes]:
        """A new file. On this machine its owner's, or its group's too, whatever the umask."""
        if not self.is_local:
            file: IO[bytes] = self._fs.open(full, "wb")
            return file
        local = open(full, "wb", opener=opener)  # noqa: SIM115
        os.fchmod(local.fileno(), self._access.file)
        return local

    def _holds(self, full: str, hashes: dict[str, str]) -> bool:
        try:
            paths = {PurePosixPath(path).name: path for path in self._fs.ls(full, detail=False)}
        except FileNotFoundError:
            return False
        return paths.keys() == hashes.keys() and all(
            self._hash(paths[name]) == hashes[name] for name in hashes
        )

    def _hash(self, full: str) -> str:
        digest = hashlib.sha256()
        with self._fs.open(full, "rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise AuroraError(
                    f"can't {doing}: no space left under {self.url}; free some, or set "
                    "AURORA_ARTIFACTS to another place"
                ) from None
            reason = error.strerror or str(error) or type(error).__name__
            raise AuroraError(f"can't {doing} under {self.url}: {reason}") from None


def _beside(full: str) -> str:
    """A name of this process's own in the same folder, see ``litter``."""
    return f"{full}.{litter.mark()}.{uuid.uuid4().hex[:8]}.tmp"


def _time_of(info: Mapping[str, Any]) -> float | None:
    """When a file was written, as its file system says it; each calls it otherwise."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return None
