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
    transport: int = 0  # envelopes that were lost between the engine and the spool
    spool_full: int = 0  # records that the full spool refused
    rejected: int = 0  # records that the store refused
    explained: int = 0  # refused envelopes whose gap in the numbers is still to come
    hello: wire.Hello | None = None  # the last one; None: not seen yet


class State(msgspec.Struct):
    segment: int = 0
    offset: int = 0
    boots: dict[int, Boot] = {}


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

    def save(self) -> None:
        """Raises ``OSError`` on a failing disk; the place in memory stays good."""
        while len(self.boots) > MAX_BOOTS:
            self.boots.pop(next(iter(self.boots)))
        state = State(self.position.segment, self.position.offset, self.boots)
        replace_file(self._path, msgspec.msgpack.encode(state))
