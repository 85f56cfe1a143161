"""Which spool folder a sidecar takes, and what becomes of those that dead sidecars left."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from pathlib import Path

from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.refused import RefusedFile
from aurora_sgl.sidecar.spool.cursor import Cursor
from aurora_sgl.sidecar.spool.log import NOTHING, Keep, Spool

MAX_SLOTS = 64

log = logging.getLogger(__name__)


def open_spool(home: Path, explicit: Path | None, limit_bytes: int, keep: Keep = NOTHING) -> Spool:
    """The folder that was asked for, or the first free one of ``home/spool/0, 1, ...``.

    Raises ``AuroraError`` when it is in use or can't be written.
    """
    if explicit is not None:
        return Spool(explicit, limit_bytes, keep=keep)
    for slot in range(MAX_SLOTS):
        try:
            return Spool(home / "spool" / str(slot), limit_bytes, keep=keep)
        except AuroraError as error:
            if "another sidecar" not in str(error):
                raise
    raise AuroraError(f"{MAX_SLOTS} sidecars use the spools in {home / 'spool'}; stop some of them")


def _copy(source: Spool, left: Cursor, target: Spool) -> tuple[int, bool]:
    """Frames that came over, and whether the target had room for all."""
    count = 0
    while frames := source.read(left.position):
        for frame in frames:
            if not target.append(frame.kind, frame.payload):
                return count, False
            count += 1
            left.position = frame.end
    return count, True


def adopt(home: Path, spool: Spool, cursor: Cursor) -> int:
    """Take over what dead sidecars left in the other slots, as far as there is room; the number of
    frames. The next call goes on where this one stopped.

    A kill in between leaves both copies, and the store takes each record once.
    """
    taken = 0
    for folder in sorted((home / "spool").glob("[0-9]*")):
        if folder == spool.folder or not folder.is_dir():
            continue
        try:
            other = Spool(folder, 1 << 62)
        except AuroraError:
            continue
        try:
            taken += _take_over(other, spool, cursor)
        finally:
            other.close()
    if taken:
        log.info("took over %d messages that another sidecar had left", taken)
    return taken


def _take_over(other: Spool, spool: Spool, cursor: Cursor) -> int:
    left = Cursor(other)
    # First, since they say what was stored before the frames that come now.
    for boot_id, boot in left.boots.items():
        if boot.last_seq >= cursor.boot(boot_id).last_seq:
            cursor.boots[boot_id] = boot
    count, whole = _copy(other, left, spool)
    spool.sync()
    if whole or count:
        with suppress(OSError):  # a full disk: what came over comes again, and changes nothing
            cursor.save()
    if whole:
        RefusedFile(spool.folder).take_over(other.folder)
        shutil.rmtree(other.folder, ignore_errors=True)
    elif count:
        with suppress(OSError):
            left.save()
            other.release(left.position)
    return count
