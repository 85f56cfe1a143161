"""What the store has taken of the spool, and what is known of each boot; renamed into place."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from aurora_sgl import wire
from aurora_sgl.atomic import replace_file
from aurora_sgl.sidecar.spool.log import Position, Spool

#: Boots that are remembered; the oldest are forgotten first.
MAX_BOOTS = 64

log = logging.getLogger(__name__)


class Boot(msgspec.Struct):
    """What a restart of the sidecar must still know of one boot of a server."""

    last_seq: int = 0  # of the last envelope that the store has
    dropped: int = 0  # records that the engine's buffer dropped (Hello.dropped)
    transport: int = 0  # records that were lost between the engine and the spool
    spool_full: int = 0  # records that the full spool refused
    rejected: int = 0  # records that the store refused
    explained: int = 0  # refused envelopes whose gap in the numbers is still to come
    hello: wire.Hello | None = None  # the last one; None: not seen yet
    explained_records: int = 0  # of those envelopes
    total: int = 0  # records of all envelopes up to last_seq, as the engine counts; 0: not known
    stored: int = 0  # the store's own watermark, as it was last; 0: not known
    stored_at: float = 0.0  # time.time() of that
    behind: bool = False  # the store forgot what it had, and it is read again
    forgotten: int = 0  # records that the store had, forgot, and that the spool has no longer
    ahead: int = 0  # the store's watermark when this sidecar met the boot: more than last_seq when
    #                 a cursor was lost or is old; what lies up to there is not missing


class State(msgspec.Struct):
    segment: int = 0
    offset: int = 0
    boots: dict[int, Boot] = {}
    until_segment: int = 0  # see Cursor.until
    until_offset: int = 0


class Cursor:
    """The reader's place in a spool. :meth:`save` is atomic; an old place only sends rows twice."""

    def __init__(self, spool: Spool) -> None:
        self._path = spool.folder / "cursor"
        state = self._load(self._path)
        start, tail = spool.start, spool.tail
        saved = Position(state.segment, state.offset)
        self.position = saved if start <= saved <= tail else start
        if saved > tail:
            log.warning("the cursor of %s lies behind its end; going on from there", spool.folder)
            self.position = tail
        self.boots = state.boots
        #: What ends here was stored before: it is read again only for a store that forgot it.
        self.until = Position(state.until_segment, state.until_offset)

    @staticmethod
    def _load(path: Path) -> State:
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=State)
        except FileNotFoundError:
            return State()
        except (OSError, msgspec.DecodeError) as error:
            log.warning("%s can't be read (%s); sending the whole spool again", path, error)
            return State()

    def boot(self, boot_id: int) -> Boot:
        return self.boots.setdefault(boot_id, Boot())

    def again(self, boots: dict[int, int], start: Position) -> None:
        """The store has forgotten what came after these numbers: all from ``start`` is read
        again, and what it has is left out."""
        self.until = max(self.until, self.position)
        self.position = start
        for boot_id, stored in boots.items():
            boot = self.boot(boot_id)
            boot.stored, boot.behind = stored, True

    def save(self) -> None:
        """Raises ``OSError`` on a failing disk; the place in memory stays good."""
        while len(self.boots) > MAX_BOOTS:
            self.boots.pop(next(iter(self.boots)))
        state = State(*self.position, self.boots, *self.until)
        replace_file(self._path, msgspec.msgpack.encode(state))
