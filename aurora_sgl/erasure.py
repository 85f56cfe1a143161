"""``db purge``: a request, rid, conversation or domain, or all before a moment, out of everything.

Order: the rule (from then on nothing of it enters the store), rows, what other rows say of them,
files, spools, and last the bytes that the database left behind. A purge that is stopped goes on
from there when the same is asked for again; until nothing is left it counts as unfinished.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.spool.erase import erase_spool, purged_in
from aurora_sgl.sidecar.spool.log import Spool
from aurora_sgl.store import purge as records
from aurora_sgl.store import purge_rows
from aurora_sgl.store.compact import compact
from aurora_sgl.store.connection import reading
from aurora_sgl.store.erased import erased_ids, wait_for_ingests
from aurora_sgl.store.purge import Selector
from aurora_sgl.store.scrub import forget_domain, forget_requests

TRACES = "traces"
#: Seconds that running sidecars get to look after their spools, and readers to end.
WAIT_SECONDS = 30.0
#: Seconds between two chunks of rows at most; else as long as the one before took.
MOST_PAUSE = 0.1
#: A trace file, also one that is being written or was left half-written: the request's number.
_TRACE_NAME = re.compile(r"^\.?(\d+)\.safetensors")

log = logging.getLogger(__name__)


@dataclass
class PurgeReport:
    """What went, or with ``dry_run`` would go."""

    dry_run: bool
    purge: int = 0  # its number
    requests: int = 0
    events: int = 0
    traces: int = 0
    roll_ups: int = 0  # rows that held nothing else
    evaluations: int = 0  # whose list of requests became shorter
    files: int = 0  # traces and copies of traces
    spool_records: int = 0  # frames and refused records that changed
    resumable_runs: int = 0
    runs: list[int] = field(default_factory=list)  # that learnt from it, or may have
    versions_that_learnt: list[int] = field(default_factory=list)
    versions_made_from_those: list[int] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # what is still to do, and who does it


def purge(
    engine: Engine,
    artifacts: ArtifactRoot,
    home: Path,
    selector: Selector,
    *,
    actor: str,
    reason: str,
    group: str = "",
    dry_run: bool = False,
    wait_seconds: float = WAIT_SECONDS,
) -> PurgeReport:
    """Remove requests everywhere: see docs/operations.md for what stays.

    ``home`` is the data folder of this machine; sidecars of other machines look after their own
    spools. ``group`` gets the audit row when no request of any group was there.
    """
    if dry_run:
        counts, runs = purge_rows.count_rows(engine, selector)
        learnt, derived = records.versions_of_runs(engine, runs)
        return PurgeReport(
            True,
            **asdict(counts),
            runs=runs,
            versions_that_learnt=learnt,
            versions_made_from_those=derived,
        )
    if not reason.strip() or not actor.strip():
        raise AuroraError("a purge needs a reason; say it with --reason")
    number = records.begin_purge(engine, selector, actor=actor, reason=reason)
    wait_for_ingests(engine)
    report = PurgeReport(False, number)
    with reading(engine) as connection:
        condition = selector.condition(connection)
    _erase_rows(engine, artifacts, report, number, condition)
    if selector.kind in ("domain", "before"):
        of_all: list[str | None] = [None]
        for domain in selector.stored_texts if selector.kind == "domain" else of_all:
            report.roll_ups += purge_rows.drop_minutes(engine, selector.until, domain)
            if domain is not None:
                forget_domain(engine, domain)
    report.evaluations = forget_requests(engine, number)
    records.rows_are_gone(engine, number)
    _erase_the_rest(engine, artifacts, home, report, wait_seconds)
    _fill_in(engine, report)
    if not report.left:
        versions = [*report.versions_that_learnt, *report.versions_made_from_those]
        records.finish_purge(engine, number, versions, group=group, actor=actor)
    return report


def purge_again(
    engine: Engine, artifacts: ArtifactRoot, home: Path, wait_seconds: float = WAIT_SECONDS
) -> PurgeReport:
    """Remove what the rules of earlier purges cover and the store has all the same: it was
    restored from a backup that is older than they are."""
    report = PurgeReport(False)
    for number, ids in purge_rows.purged_again(engine):
        report.requests += len(ids)
        _erase_rows(engine, artifacts, report, number, records.numbered(ids))
        report.evaluations += forget_requests(engine, number)
    for domain, until in purge_rows.purged_domains(engine).items():
        report.roll_ups += purge_rows.drop_minutes(engine, until, domain)
        forget_domain(engine, domain)
    if report.requests or report.roll_ups:
        _erase_the_rest(engine, artifacts, home, report, wait_seconds)
    return report


def _erase_rows(
    engine: Engine, artifacts: ArtifactRoot, report: PurgeReport, number: int, condition: Any
) -> None:
    begin = time.monotonic()
    while (chunk := purge_rows.purge_chunk(engine, number, condition)) is not None:
        pause = min(MOST_PAUSE, time.monotonic() - begin)
        report.files += _delete_files(artifacts, chunk.uris)
        time.sleep(pause)  # others get their turn: SQLite's lock goes to whoever asks first
        begin = time.monotonic()


def _delete_files(artifacts: ArtifactRoot, uris: list[str]) -> int:
    for uri in uris:
        artifacts.delete(uri)
    return len(uris)


def _erase_the_rest(
    engine: Engine, artifacts: ArtifactRoot, home: Path, report: PurgeReport, seconds: float
) -> None:
    """Files, spools and what the database left behind of rows."""
    report.spool_records, waiting = _erase_spools(engine, artifacts, home)
    report.files += _erase_trace_files(engine, artifacts, home)
    report.resumable_runs = _erase_training(engine, home)
    report.left += _wait_for_sidecars(engine, waiting, seconds)
    for chunk in purge_rows.purge_noted(engine):  # what only a spool could tell
        report.files += _delete_files(artifacts, chunk.uris)
    if problem := compact(engine, seconds):
        report.left.append(problem)


def _fill_in(engine: Engine, report: PurgeReport) -> None:
    """What all calls of this purge took together."""
    details: dict[str, Any] = records.erasure(engine, report.purge).details
    for name, count in asdict(records.RowCounts.of(details)).items():
        setattr(report, name, count)
    report.runs = list(details.get("runs", ()))
    learnt, derived = records.versions_of_runs(engine, report.runs)
    report.versions_that_learnt, report.versions_made_from_those = learnt, derived


def _erase_spools(engine: Engine, artifacts: ArtifactRoot, home: Path) -> tuple[int, list[Path]]:
    """Take purged requests out of the spools that dead sidecars left; what changed, and the
    folders that running ones hold."""
    count, held = 0, []
    for folder in sorted((home / "spool").glob("*")):
        if not folder.is_dir():
            continue
        try:
            spool = Spool(folder, 1 << 62)
        except AuroraError:
            held.append(folder)
            continue
        try:
            count += erase_spool(spool, engine, artifacts.delete)
        finally:
            spool.close()
    return count, held


def _wait_for_sidecars(engine: Engine, folders: list[Path], seconds: float) -> list[str]:
    """What running sidecars still have of it in their spools after so long."""
    deadline = time.monotonic() + seconds
    while True:
        folders = [folder for folder in folders if purged_in(folder, engine)]
        if not folders or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return [
        f"{folder} still holds some of it: its sidecar is running and has not looked after it yet"
        for folder in folders
    ]


def _erase_trace_files(engine: Engine, artifacts: ArtifactRoot, home: Path) -> int:
    """Delete trace files of purged requests that no row names: half-written ones, those whose row
    is on its way or went before, and copies on this machine."""
    count = 0
    for uris in _pieces(uri for uri, _ in artifacts.files(TRACES)):
        for uri in _purged(engine, uris):
            artifacts.delete(uri)
            count += 1
    copies = [str(path) for path in (home / "cache" / TRACES).rglob("*") if path.is_file()]
    scratch = {str(path): _number_within(path) for path in (home / "tmp").glob("*.trace")}
    with reading(engine) as connection:
        purged = erased_ids(connection, scratch.values())
    litter = [path for path, number in scratch.items() if number in purged]
    for place in (*_purged(engine, copies), *litter):
        Path(place).unlink(missing_ok=True)
        count += 1
    return count


def _pieces(names: Iterable[str], size: int = 5000) -> Iterator[list[str]]:
    piece: list[str] = []
    for name in names:
        piece.append(name)
        if len(piece) == size:
            yield piece
            piece = []
    yield piece


def _purged(engine: Engine, names: Iterable[str]) -> list[str]:
    """Those of these trace files whose request was purged."""
    numbers = {
        name: int(match[1])
        for name in names
        if (match := _TRACE_NAME.match(name.rpartition("/")[2])) and len(match[1]) < 19
    }
    with reading(engine) as connection:
        purged = erased_ids(connection, numbers.values())
    return [name for name, number in numbers.items() if number in purged]


def _number_within(path: Path) -> int:
    """The request that a trace file says it is of; 0: none that can be read."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, 1 << 20)))
        return int(header["__metadata__"]["request_id"])
    except (OSError, ValueError, KeyError, struct.error):
        return 0


def _erase_training(engine: Engine, home: Path) -> int:
    """Delete what runs left behind to be gone on with, where it was learnt from purged requests.
    A run that goes on meanwhile gives up by itself before it makes a version."""
    count = 0
    for folder in sorted((home / "training").glob("group-*")):
        numbers = _examples_of(folder / "plan.json")
        with reading(engine) as connection:
            is_purged = numbers is None or bool(erased_ids(connection, numbers))
        if is_purged:
            shutil.rmtree(folder, ignore_errors=True)
            count += 1
    return count


def _examples_of(plan: Path) -> set[int] | None:
    """The requests of a run that was left behind; ``None``: it says none, so nobody goes on with
    it."""
    try:
        parts = json.loads(plan.read_text())
        return {
            int(number)
            for name in ("window", "replay", "dev", "held_out")
            for number in parts[name]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
