"""Which requests are traced: whole conversations, so that what a turn finds in the prefix cache was
traced too.

Traced requests have a part of the prefix cache of their own. A turn whose conversation changed its
part would find nothing of it there, and be computed from its first token. So every turn stays where
the turns before it were: it is known by its prompt, which goes on from the whole prompt of a turn
before it. Where a client's turns do not (a template may leave out what a model thought), a name
holds them together: ``x-aurora-conversation``, or SGLang's ``session_id``.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from aurora_sgl.engine import clean

REMEMBERED = 16_384  # turns
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers never become 0


class Place(IntEnum):
    """Where a conversation's turns are, and what is done with the next one."""

    PLAIN = 0  # among the requests that are not traced
    TRACED = 1
    #: Among the traced ones, without a trace: one of its turns has none, so that those of later
    #: turns would have a hole.
    HELD = 2


class ConversationTurn(NamedTuple):
    """One request of a conversation."""

    key: int  # the same for the same prompt
    length: int  # tokens of its prompt
    before: Place | None  # where the turns before it are; None: there are none that we know
    again: Place | None = None  # where the same prompt was before; it is in the cache there
    name: str = ""  # of its conversation, where the client gives one


class Conversations:
    """The last turns of a scheduler process: on the leading rank."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._lengths = np.zeros(remembered, np.int64)  # 0: nothing yet
        self._keys = np.zeros(remembered, np.uint64)
        self._places = np.zeros(remembered, np.int8)
        self._next = 0
        self._powers = np.ones(1, np.uint64)
        self._credit = 0.0

    def find(self, prompt: Sequence[int] | None, name: str = "") -> ConversationTurn:
        """A request that came in; ``name``: of its conversation, if it has one."""
        if not prompt:
            return ConversationTurn(0, 0, None, name=name)
        sums = self._sums(prompt)
        starts = np.flatnonzero((self._lengths > 0) & (self._lengths <= len(sums)))
        starts = starts[sums[self._lengths[starts] - 1] == self._keys[starts]]
        same = starts[self._lengths[starts] == len(sums)]
        shorter = starts[self._lengths[starts] < len(sums)]
        before = again = None
        if len(same):
            again = Place(int(self._places[same[0]]))
        if len(shorter):
            before = Place(int(self._places[shorter[np.argmax(self._lengths[shorter])]]))
        return ConversationTurn(int(sums[-1]), len(sums), before, again, name)

    def wants_trace(self, turn: ConversationTurn, share: float) -> bool:
        """Whether a turn is to be traced, where ``share`` of the conversations are."""
        if turn.before is not None:
            return turn.before is Place.TRACED
        if turn.again in (Place.TRACED, Place.HELD):
            return True  # what is cached of it there was traced
        if turn.name:
            return zlib.crc32(clean.text(turn.name).encode()) < share * 2**32
        self._credit += share
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True

    def keep(self, turn: ConversationTurn, *, traced: bool) -> Place:
        """Remember whether a turn is traced. Returns where it belongs."""
        if traced:
            place = Place.TRACED
        else:
            where = turn.before if turn.before is not None else turn.again
            place = Place.PLAIN if where in (None, Place.PLAIN) else Place.HELD
        if not turn.length:
            return place
        same = (self._lengths == turn.length) & (self._keys == np.uint64(turn.key))
        slots = np.flatnonzero(same)
        slot = int(slots[0]) if len(slots) else self._next
        if not len(slots):
            self._next = (self._next + 1) % len(self._lengths)
        self._lengths[slot], self._keys[slot] = turn.length, turn.key
        self._places[slot] = place
        return place

    def hold(self, key: int) -> None:
        """The trace of a turn broke off: later ones would have a hole."""
        traced = (self._keys == np.uint64(key)) & (self._places == Place.TRACED)
        self._places[traced] = Place.HELD

    def _sums(self, prompt: Sequence[int]) -> np.ndarray:
        """[tokens] hashes of every start of a prompt: sums of (token + 1) base^place, mod 2^64."""
        tokens = np.frombuffer(array("q", prompt), np.uint64)
        if len(self._powers) < len(tokens):
            more = np.full(max(len(tokens), 2 * len(self._powers)), _BASE, np.uint64)
            more[0] = 1
            self._powers = np.multiply.accumulate(more)
        return np.cumsum((tokens + np.uint64(1)) * self._powers[: len(tokens)], dtype=np.uint64)
