"""Files of the artifact root, as paths on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from aurora_sgl import atomic
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError


class TraceFiles:
    """Paths of trace files: in place when the root is a local folder, else fetched once."""

    def __init__(self, artifacts: ArtifactRoot, cache: Path) -> None:
        self.artifacts, self.cache = artifacts, cache

    def __call__(self, uri: str) -> Path:
        """A path that exists, or one that does not when the file is gone.

        Raises ``AuroraError`` when a remote file cannot be fetched.
        """
        local = self.artifacts.local_path(uri)
        if local is not None:
            return local
        path = self.cache / uri
        if not path.exists():
            self._fetch(uri, path)
        return path

    def _fetch(self, uri: str, path: Path) -> None:
        try:
            with (
                atomic.written(path) as new,
                self.artifacts.open(uri) as source,
                new.open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink)
        except OSError as error:
            raise AuroraError(f"cannot fetch trace {uri}: {error}") from None
