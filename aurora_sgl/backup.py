"""``db backup`` and ``db restore``: rows, and the weights and traces that they name, in a folder.

Rows first, as they are at one moment, then the files that these rows name, each checked by the
hash in its row; a trace that the byte budget took meanwhile is only counted. A restore puts files
before rows, so that no row ever names a file that is not there. ``manifest.json`` is written last.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import atomic, store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.erasure import purge_again
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_file
from aurora_sgl.private import OWNER
from aurora_sgl.rollout.versions import fetch_verified
from aurora_sgl.store import queries
from aurora_sgl.store.backup import NamedFile, StoreDump, check, dump, load

MANIFEST = "manifest.json"
FORMAT = 1
_FILES = "artifacts"


@dataclass
class BackupReport:
    """What was copied."""

    database: str
    revision: str
    traces: int = 0
    versions: int = 0
    bytes: int = 0
    traces_gone: int = 0  # the byte budget or a purge took them meanwhile
    versions_without_weights: list[int] = field(default_factory=list)


@dataclass
class RestoreReport:
    """What is back."""

    database: str
    revision: str
    made_at: str
    files: int = 0
    purged_again: int = 0  # requests that were purged after the backup was made


def back_up(engine: Engine, artifacts: ArtifactRoot, folder: Path) -> BackupReport:
    """Copy the store into a new folder; other processes go on meanwhile. Raises ``AuroraError``
    when there is something in the folder, or when rows can't be copied."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AuroraError(f"{folder} is not empty; choose another folder for the backup")
    with atomic.written(folder) as new:
        new.mkdir(mode=OWNER.folder)
        rows, files = dump(engine, new)
        report = BackupReport(rows.database, rows.revision)
        for one in files:
            if one.version_id:
                _copy_weights(engine, artifacts, one, new, report)
            else:
                _copy_trace(artifacts, one, new, report)
        for path in new.rglob("*"):
            path.chmod(OWNER.folder if path.is_dir() else OWNER.file)
        paths = sorted(path for path in new.rglob("*") if path.is_file())
        for path in paths:
            report.bytes += path.stat().st_size
        manifest = {
            "format": FORMAT,
            "made_at": utc_now().isoformat(),
            "store": asdict(rows),
            "files": {str(path.relative_to(new)): sha256_file(path) for path in paths},
        }
        data = json.dumps(manifest, indent=1).encode()
        atomic.replace_file(new / MANIFEST, data, mode=OWNER.file)
    return report


def _copy_weights(
    engine: Engine, artifacts: ArtifactRoot, one: NamedFile, into: Path, report: BackupReport
) -> None:
    """Groups may share weights; they are copied once."""
    place = into / _FILES / one.uri
    try:
        if not place.exists():
            with store.session(engine, write=False) as s:
                version = queries.versions.version(s, one.version_id)
            fetch_verified(artifacts, version, place)
        report.versions += 1
    except AuroraError:
        report.versions_without_weights.append(one.version_id)


def _copy_trace(artifacts: ArtifactRoot, one: NamedFile, into: Path, report: BackupReport) -> None:
    place = into / _FILES / one.uri
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with artifacts.open(one.uri) as source, place.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    except (AuroraError, FileNotFoundError):
        place.unlink(missing_ok=True)
    if place.exists() and one.sha256 and sha256_file(place) != one.sha256:
        place.unlink()
    if place.exists():
        report.traces += 1
    else:
        report.traces_gone += 1


def restore(
    engine: Engine, artifacts: ArtifactRoot, folder: Path, home: Path, *, force: bool = False
) -> RestoreReport:
    """Put a backup in the place of the store. What was purged since it was made is purged again.

    Raises ``AuroraError``, and changes nothing, for a folder that is no whole backup, for another
    kind of database, and without ``force`` for a store that has rows.
    """
    manifest = _read_manifest(folder)
    rows = StoreDump(**manifest["store"])
    check(engine, rows, force=force)
    _check_files(folder, manifest["files"])
    report = RestoreReport(rows.database, rows.revision, manifest["made_at"])
    files = [name for name in manifest["files"] if name.startswith(f"{_FILES}/")]
    weights = {str(Path(name).parent) for name in files if name.startswith(f"{_FILES}/versions/")}
    for name in sorted(weights):
        artifacts.put_folder(folder / name, name.removeprefix(f"{_FILES}/") + "/")
    for name in files:
        if str(Path(name).parent) not in weights:
            artifacts.put_file(folder / name, name.removeprefix(f"{_FILES}/"))
    report.files = len(files)
    load(engine, rows, folder, force=force)
    _forget_traces(engine, {name.removeprefix(f"{_FILES}/") for name in files})
    again = purge_again(engine, artifacts, home)
    report.purged_again = again.requests
    return report


def _forget_traces(engine: Engine, uris: set[str]) -> None:
    """No row names a trace that was gone when the backup was made."""
    with store.session(engine) as s:
        traces = queries.traces.traces_oldest_first(s, with_pinned=True)
        gone = [trace.request_id for trace in traces if trace.uri not in uris]
        queries.traces.delete_traces(s, gone)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise AuroraError(f"{folder} was made by another release; use that one")
        StoreDump(**manifest["store"])
        assert isinstance(manifest["files"], dict) and manifest["made_at"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise AuroraError(
            f"{folder} is no whole backup: its {MANIFEST} is missing or damaged"
        ) from None
    return manifest


def _check_files(folder: Path, files: dict[str, str]) -> None:
    for name, sha256 in files.items():
        path = folder / name
        if ".." in Path(name).parts or not path.is_file() or sha256_file(path) != sha256:
            raise AuroraError(
                f"{folder} is damaged: {name} is missing or was changed; nothing was restored"
            )
