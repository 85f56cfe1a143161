"""Which traced requests are turns of one conversation, known by their tokens where no client says.

Request B goes on from request A if B's prompt begins with A's prompt and the first half of A's
answer (64 tokens of it at most: a client may change the end, and a model's own tokens are not
always those that its text is cut into again). Where a template leaves out what a model thought, or
a text is cut otherwise, B begins with A's prompt alone: under a chat template, whose prompts end
where the answer begins, that is a later turn of the same first messages, and the newest such A
counts. Two prompts that merely share their beginning are not turns of one another.

A conversation is ``SIDE:THREAD``. The thread is the hash of its first turn's prompt and answer, so
that users who send the same first prompt and get other answers have two conversations. The side,
by which ``splits`` decides, is the hash of the first prompt, as without this: copies of one prompt
stay together. Once a prompt is known to open conversations, its next ones have a side each, or all
chats that begin with "hi" would be held out, or none. A turn from which ``MOST_BRANCHES``
conversations went on is form, as a system prompt is: later ones begin anew.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aurora_sgl.store.queries.traces import DERIVED

Ints = NDArray[np.int32]
Hashes = NDArray[np.uint64]  # [2, n]: 128 bits of each beginning
Slots = NDArray[np.int64]

#: Turns that are remembered, the newest.
REMEMBERED = 16_384
#: Tokens of an answer that tell it from others, at most; else half of them.
TELLING = 64
#: Copies of a prompt of which it is looked up whether conversations went on from them.
LOOKED_AT = 256
#: Conversations that may go on from one turn.
MOST_BRANCHES = 8

_ODD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31))


class PrefixHash:
    """128-bit hashes of every beginning of a prompt, in one pass: sums modulo 2^64 of keyed random
    numbers, one for each token at its place. Who does not have the key can't make two that meet.

    The numbers are those of splitmix64 (Steele et al., OOPSLA 2014) from a secret start.
    """

    def __init__(self, key: bytes) -> None:
        digest = hashlib.sha256(b"prefixes of prompts" + key).digest()
        self._keys = np.frombuffer(digest, np.uint64)[:2]

    def of(self, tokens: Ints) -> Hashes:
        """``[:, n - 1]`` is the hash of the first n tokens."""
        mixed = np.arange(len(tokens), dtype=np.uint64) << np.uint64(32)
        mixed |= tokens.astype(np.uint64)
        mixed = mixed ^ self._keys[:, None]
        for odd, shift in zip(_ODD, _SHIFTS, strict=False):
            mixed ^= mixed >> shift
            mixed *= odd
        mixed ^= mixed >> _SHIFTS[-1]
        return np.cumsum(mixed, axis=1, dtype=np.uint64)


@dataclass(frozen=True)
class ChatTurn:
    """A request as others may go on from it. Keys are 32 hexadecimal digits."""

    request_id: int
    prompt_tokens: int
    prompt_key: str
    answer_tokens: int  # tokens of the prompt and of so much of the answer as tells it
    answer_key: str
    conversation: str


class _Beginnings:
    """Lengths and hashes of remembered beginnings, a slot for each turn."""

    def __init__(self, most: int) -> None:
        self.lengths = np.zeros(most, np.int64)  # 0: nothing
        self._hashes = np.zeros((2, most), np.uint64)
        self._names = [""] * most
        self._branches: dict[str, set[str]] = {}  # by key: prompts that went on from there

    def put(self, slot: int, length: int, key: str) -> None:
        self._branches.pop(self._names[slot], None)
        self.lengths[slot], self._names[slot] = length, key
        self._hashes[:, slot] = int(key[:16], 16), int(key[16:], 16)

    def matches(self, hashes: Hashes, at_most: int) -> Slots:
        """Slots of beginnings, of ``at_most`` tokens, of a prompt with these hashes."""
        slots = np.flatnonzero((self.lengths > 0) & (self.lengths <= at_most))
        for of_prompt, remembered in zip(hashes, self._hashes, strict=True):
            slots = slots[of_prompt[self.lengths[slots] - 1] == remembered[slots]]
        return slots

    def branches(self, slot: int) -> set[str]:
        return self._branches.setdefault(self._names[slot], set())

    def has_branches(self, slot: int) -> bool:
        return bool(self._branches.get(self._names[slot]))


@dataclass
class TurnIndex:
    """The newest turns of all servers of a store. One thread uses it."""

    hashing: PrefixHash
    most: int = REMEMBERED
    _turns: dict[int, ChatTurn] = field(default_factory=dict)  # by request

    def __post_init__(self) -> None:
        self._prompts, self._answers = (_Beginnings(self.most) for _ in range(2))
        self._requests = [0] * self.most  # ids, by slot
        self._ages = np.zeros(self.most, np.int64)
        self._count = 0

    def __len__(self) -> int:
        return len(self._turns)

    def place(self, request_id: int, tokens: Ints, prompt_tokens: int, own_key: str) -> ChatTurn:
        """The turn of a request with its conversation; the same again for the same request.

        ``tokens``: prompt and answer; ``own_key``: the hash of the prompt in the store. Raises
        ``ValueError`` for a prompt without tokens.
        """
        if request_id in self._turns:
            return self._turns[request_id]
        if not 0 < prompt_tokens <= len(tokens):
            raise ValueError(f"a prompt of {prompt_tokens} tokens of {len(tokens)}")
        telling = min(TELLING, -(-(len(tokens) - prompt_tokens) // 2))
        hashes = self.hashing.of(tokens[: prompt_tokens + telling])
        prompt_key = _hex(hashes[:, prompt_tokens - 1])
        answer_key = _hex(hashes[:, -1])
        prompts = self._prompts.matches(hashes, prompt_tokens)
        is_same = self._prompts.lengths[prompts] == prompt_tokens
        answers = self._answers.matches(hashes, prompt_tokens + telling)
        conversation = self._again(answers, prompt_tokens, prompt_tokens + telling)
        if not conversation:
            shorter = answers[self._answers.lengths[answers] < prompt_tokens]
            conversation = self._before(shorter, prompts[~is_same], prompt_key)
        if not conversation:
            side = answer_key if self._opens(prompts[is_same]) else own_key
            conversation = f"{side}{DERIVED}{answer_key[:16]}"
        length = prompt_tokens + telling
        turn = ChatTurn(request_id, prompt_tokens, prompt_key, length, answer_key, conversation)
        self.put(turn)
        return turn

    def put(self, turn: ChatTurn) -> None:
        """Remember a turn, as another server or this one before its restart placed it."""
        if turn.request_id in self._turns:
            return
        slot = self._count % self.most
        self._count += 1
        self._turns.pop(self._requests[slot], None)
        self._requests[slot], self._ages[slot] = turn.request_id, self._count
        self._turns[turn.request_id] = turn
        self._prompts.put(slot, turn.prompt_tokens, turn.prompt_key)
        self._answers.put(slot, turn.answer_tokens, turn.answer_key)

    def forget(self) -> None:
        """Everything."""
        self._turns.clear()
        self.__post_init__()

    def _again(self, answers: Slots, prompt_tokens: int, length: int) -> str:
        """The conversation of the same prompt with the same answer; empty: there is none."""
        is_same = self._answers.lengths[answers] == length
        is_same &= self._prompts.lengths[answers] == prompt_tokens
        same = answers[is_same]
        return self._turns[self._requests[same[0]]].conversation if len(same) else ""

    def _before(self, answers: Slots, prompts: Slots, prompt_key: str) -> str:
        """The conversation of the turn that a prompt goes on from; empty: of none. ``answers``,
        ``prompts``: turns with whose answer, or prompt alone, it begins."""
        ways = [(self._answers, answers), (self._prompts, prompts)]
        beginnings, slots = max(ways, key=lambda way: int(way[0].lengths[way[1]].max(initial=0)))
        if not len(slots):
            return ""
        longest = slots[beginnings.lengths[slots] == beginnings.lengths[slots].max()]
        newest = int(longest[np.argmax(self._ages[longest])])
        branches = beginnings.branches(newest)
        if len(branches) >= MOST_BRANCHES and prompt_key not in branches:
            return ""
        branches.add(prompt_key)
        return self._turns[self._requests[newest]].conversation

    def _opens(self, same: Slots) -> bool:
        """Whether conversations went on from a prompt; ``same``: turns with it."""
        return any(
            self._answers.has_branches(slot) or self._prompts.has_branches(slot)
            for slot in same[-LOOKED_AT:]
        )


def _hex(pair: NDArray[np.uint64]) -> str:
    return f"{int(pair[0]):016x}{int(pair[1]):016x}"
