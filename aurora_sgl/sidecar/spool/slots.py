"""Which spool folder a sidecar takes, and what becomes of those that dead sidecars left."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.refused import RefusedFile
from aurora_sgl.sidecar.spool.cursor import Cursor
from aurora_sgl.sidecar.spool.log import Spool

MAX_SLOTS = 64

log = logging.getLogger(__name__)


def open_spool(home: Path, explicit: Path | None, limit_bytes: int) -> Spool:
    """The folder that was asked for, or the first free one of ``home/spool/0, 1, ...``.

    Raises ``AuroraError`` when it is in use or can't be written.
    """
    if explicit is not None:
        return Spool(explicit, limit_bytes)
    for slot in range(MAX_SLOTS):
        try:
            return Spool(home / "spool" / str(slot), limit_bytes)
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
        left.position = frames[-1].end
    return count, True


def adopt(home: Path, spool: Spool, cursor: Cursor) -> int:
    """Take over what dead sidecars left in the other slots; the number of frames.

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
        left = Cursor(other)
        copied, whole = _copy(other, left, spool)
        taken += copied
        if whole:
            for boot_id, boot in left.boots.items():
                if boot.last_seq >= cursor.boot(boot_id).last_seq:
                    cursor.boots[boot_id] = boot
            spool.sync()
            cursor.save()
            RefusedFile(spool.folder).take_over(folder)
            shutil.rmtree(folder, ignore_errors=True)
        other.close()
    if taken:
        log.info("took over %d messages that another sidecar had left", taken)
    return taken
