"""Weights of a version in shared memory, fetched and checked, for the engine to take in pieces.

The file is a safetensors file: its header tells where the raw tensors lie. Its folder and name are
new and cannot be guessed, and nobody else may read them. Only shared memory will do: to read from
a disk could take longer than a decode step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aurora_sgl import wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.sidecar.servers import drafter_path

if TYPE_CHECKING:
    from aurora_sgl.drafter.target import TargetInfo

SHARED_MEMORY = Path("/dev/shm")
#: Seconds after which what a dead sidecar left in shared memory is deleted by another one.
STALE_SECONDS = 1800
#: Of shared memory, for everything else.
SPARE_BYTES = 16 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """The parts of a ``drafter_version`` row that staging needs."""

    version_id: int
    weights_uri: str
    weights_sha256: str


@dataclass(frozen=True)
class StagedFile:
    wanted: Wanted
    folder: Path
    path: Path  # of the safetensors file
    size: int = 0  # bytes


class Stager:
    """Puts weights into shared memory, and hashes what the engine has written there."""

    def __init__(self, artifacts: ArtifactRoot, home: Path, endpoint: Path) -> None:
        self._artifacts = artifacts
        self._earlier = home / "stage"  # where earlier releases put large ones
        self._mine = f"aurora-sgl-{sha256_bytes(os.fsencode(endpoint.absolute()))[:8]}-"
        self.clean()

    def clean(self) -> None:
        """Delete what an earlier sidecar of this endpoint, or a long dead one, left behind."""
        for root in (SHARED_MEMORY, self._earlier):
            for folder in root.glob("aurora-sgl-*-*"):
                with contextlib.suppress(OSError):
                    old = time.time() - folder.stat().st_mtime > STALE_SECONDS
                    if folder.name.startswith(self._mine) or (old and not _alive(folder.name)):
                        shutil.rmtree(folder)

    def stage(self, wanted: Wanted, hello: wire.Hello) -> StagedFile:
        """Fetch, check and copy. Raises ``AuroraError`` when the version must not go live."""
        from aurora_sgl.drafter import checkpoint  # torch: only when there is something to stage

        with tempfile.TemporaryDirectory(prefix="aurora-sgl-fetch-") as scratch:
            source = self._folder(wanted, Path(scratch))
            target = target_info(hello)
            problems = checkpoint.validate(source, target)
            if problems:
                raise AuroraError(
                    f"version {wanted.version_id} does not fit this server: {problems[0]}"
                )
            layers = target.num_layers if target else 0
            self._refuse_other_shape(source, hello, wanted, layers)
            weights = source / checkpoint.WEIGHTS
            folder = self._room(weights.stat().st_size, wanted.version_id)
            try:
                _copy(weights, folder / checkpoint.WEIGHTS)
                sha256 = checkpoint.content_sha256(checkpoint.read_tensors(folder))
                if sha256 != wanted.weights_sha256:
                    raise AuroraError(
                        f"the weights of version {wanted.version_id} are not what was stored: "
                        f"hash {sha256[:16]}, expected {wanted.weights_sha256[:16]}"
                    )
            except (OSError, AuroraError) as error:
                shutil.rmtree(folder, ignore_errors=True)
                if isinstance(error, AuroraError):
                    raise
                raise AuroraError(f"can't stage the weights in {folder}: {error}") from error
        path = folder / checkpoint.WEIGHTS
        return StagedFile(wanted, folder, path, path.stat().st_size)

    @staticmethod
    def _refuse_other_shape(source: Path, hello: wire.Hello, wanted: Wanted, layers: int) -> None:
        """The engine copies tensors in place: shapes must be those that it was started with."""
        from aurora_sgl.drafter.architectures import read_config

        booted = drafter_path(hello)
        if not booted or not Path(booted).is_dir():
            return
        have = read_config(Path(booted), target_layers=layers)
        want = read_config(source, target_layers=layers)
        # How far positions go is no shape, and a server may serve further than its drafter says.
        names = {field.name for field in dataclasses.fields(have)} - {"max_positions"}
        for name in sorted(names):
            if not name.startswith("target_") and getattr(have, name) != getattr(want, name):
                raise AuroraError(
                    f"version {wanted.version_id} has {name} {getattr(want, name)}, the server "
                    f"was started with {getattr(have, name)}; restart it with that version"
                )

    def _folder(self, wanted: Wanted, scratch: Path) -> Path:
        try:
            local = self._artifacts.local_path(wanted.weights_uri)
            if local is not None:
                return Path(local)
            self._artifacts.fetch_folder(wanted.weights_uri, scratch)
        except OSError as error:
            raise AuroraError(f"can't fetch {wanted.weights_uri}: {error}") from error
        return scratch

    def _room(self, size: int, version_id: int) -> Path:
        """A new folder in shared memory that takes so many bytes."""
        root, need = SHARED_MEMORY, size + SPARE_BYTES
        try:
            free = shutil.disk_usage(root).free
            if free < need:
                raise AuroraError(
                    f"{root} has {free >> 20} MB left, and version {version_id} needs "
                    f"{need >> 20} MB there: enlarge it (docker run --shm-size)"
                )
            prefix = f"{self._mine}{os.getpid()}-v{version_id}-"
            return Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        except OSError as error:
            raise AuroraError(f"can't write to {root}: {error.strerror}") from error

    @staticmethod
    def live_sha256(staged: StagedFile) -> str:
        """Hash of what the engine read back from its model and wrote into the file.

        Raises ``AuroraError`` when that is no whole file.
        """
        from aurora_sgl.drafter import checkpoint

        return checkpoint.content_sha256(checkpoint.read_tensors(staged.folder))

    @staticmethod
    def discard(staged: StagedFile) -> None:
        shutil.rmtree(staged.folder, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Into a new file that only this user may read."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with source.open("rb") as reader, os.fdopen(descriptor, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def _alive(name: str) -> bool:
    with contextlib.suppress(ValueError, IndexError, ProcessLookupError, PermissionError):
        os.kill(int(name.split("-")[3]), 0)
        return True
    return False


def target_info(hello: wire.Hello) -> TargetInfo | None:
    """The server's target as ``drafter.checkpoint.validate`` wants it; None when not said."""
    from aurora_sgl.drafter.target import TargetInfo, read_target

    description = hello.server
    model = str(description.get("target_model", ""))
    revision = str(description.get("target_revision", ""))
    if (Path(model) / "config.json").is_file():
        return read_target(Path(model), model=model, revision=revision)
    sizes = [
        description.get(f"target_{name}") for name in ("hidden_size", "vocab_size", "num_layers")
    ]
    if not all(sizes):
        return None
    hidden, vocabulary, layers = (int(size) for size in sizes if size)
    return TargetInfo(
        model=model,
        hidden_size=hidden,
        vocab_size=vocabulary,
        num_layers=layers,
        model_type="",
        raw={},
        revision=revision,
    )
