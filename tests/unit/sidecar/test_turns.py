"""Turns of one conversation are known by their tokens alone."""

from __future__ import annotations

import time
from itertools import count

import numpy as np
import pytest

from aurora_sgl.sidecar.traces.turns import MOST_BRANCHES, ChatTurn, PrefixHash, TurnIndex

SYSTEM, USER, ASSISTANT, END = [1, 2, 3, 4, 5, 6], [90], [91], [92]
NUMBERS = count(1)


def words(seed: int, length: int = 12) -> list[int]:
    return np.random.default_rng(seed).integers(100, 40_000, length).tolist()


class Chat:
    """A client that sends all of its messages again each time, under a chat template."""

    def __init__(self, index: TurnIndex) -> None:
        self.index, self.messages = index, list(SYSTEM)

    def say(self, text: list[int], answer: list[int], *, shown: list[int] | None = None) -> str:
        """The conversation of this turn. ``shown``: of the answer, what later prompts have."""
        prompt = [*self.messages, *USER, *text, *END, *ASSISTANT]
        tokens = np.array([*prompt, *answer, *END], np.int32)
        number = next(NUMBERS)
        turn = self.index.place(number, tokens, len(prompt), f"hash of {prompt}")
        assert self.index.place(number, tokens, len(prompt), "another").conversation == (
            turn.conversation
        )
        self.messages = [*prompt, *(answer if shown is None else shown), *END]
        return turn.conversation


@pytest.fixture
def index() -> TurnIndex:
    return TurnIndex(PrefixHash(b"secret"))


def side(conversation: str) -> str:
    return conversation.partition(":")[0]


def test_all_turns_of_a_chat_are_one_conversation_on_the_side_of_the_first(
    index: TurnIndex,
) -> None:
    chat = Chat(index)
    turns = [chat.say(words(n), words(50 + n, 40)) for n in range(5)]
    assert len(set(turns)) == 1
    assert side(turns[0]) == f"hash of {[*SYSTEM, *USER, *words(0), *END, *ASSISTANT]}"


def test_turns_whose_thinking_is_left_out_of_later_prompts_are_one_too(index: TurnIndex) -> None:
    chat = Chat(index)
    turns = [chat.say(words(n), words(50 + n, 40), shown=words(80 + n, 5)) for n in range(5)]
    assert len(set(turns)) == 1


def test_an_answer_whose_end_is_cut_otherwise_in_the_next_prompt_is_the_same(
    index: TurnIndex,
) -> None:
    chat = Chat(index)
    answer = words(50, 40)
    first = chat.say(words(0), answer, shown=[*answer[:30], 7, 8])
    assert chat.say(words(1), words(51)) == first


def test_single_turns_under_one_system_prompt_are_as_many_conversations(index: TurnIndex) -> None:
    found = {Chat(index).say(words(n), words(500 + n)) for n in range(200)}
    assert len(found) == 200 and len({side(one) for one in found}) == 200


@pytest.mark.parametrize("interleaved", [True, False])
def test_users_who_begin_alike_and_go_apart_are_two_conversations(
    index: TurnIndex, interleaved: bool
) -> None:
    chats = [Chat(index), Chat(index)]
    order = [0, 1, 0, 1, 0, 1] if interleaved else [0, 0, 0, 1, 1, 1]
    turns: dict[int, list[str]] = {0: [], 1: []}
    for user in order:
        done = len(turns[user])
        text = words(0) if not done else words(10 * user + done)
        turns[user].append(chats[user].say(text, words(100 + 10 * user + done)))
    assert len(set(turns[0])) == len(set(turns[1])) == 1 and turns[0] != turns[1]
    if not interleaved:  # by then it is clear that the prompt opens conversations
        assert side(turns[0][0]) != side(turns[1][0])


def test_copies_of_a_prompt_that_nobody_goes_on_from_stay_on_one_side(index: TurnIndex) -> None:
    found = [Chat(index).say(words(0), words(100 + n)) for n in range(20)]
    assert len({side(one) for one in found}) == 1 and len(set(found)) == 20
    assert len({Chat(index).say(words(0), words(100)) for _ in range(3)} | {found[0]}) == 1


def test_an_opening_that_all_chats_share_does_not_make_them_one(index: TurnIndex) -> None:
    """An agent whose first message, and its greedy answer, are always the same."""
    found = []
    for n in range(60):
        chat = Chat(index)
        chat.say(words(0), words(1))
        turns = [chat.say(words(1000 + 10 * n + k), words(5000 + 10 * n + k)) for k in range(3)]
        assert len(set(turns)) == 1
        found.append(turns[0])
    assert len(set(found)) == 60 - MOST_BRANCHES + 1
    assert len({side(one) for one in found}) == len(set(found))


def test_the_index_forgets_the_oldest_turns_and_everything_when_told_to() -> None:
    index = TurnIndex(PrefixHash(b"secret"), most=8)
    old = Chat(index)
    first = old.say(words(0), words(1))
    for n in range(8):
        Chat(index).say(words(10 + n), words(30 + n))
    assert len(index) == 8
    assert old.say(words(2), words(3)) != first
    index.forget()
    assert len(index) == 0


def test_hashes_depend_on_the_key_the_tokens_and_their_order() -> None:
    tokens = np.array([1, 2, 3, 2, 1], np.int32)
    ours = PrefixHash(b"secret").of(tokens)
    assert (ours == PrefixHash(b"secret").of(tokens[:3])[:, :1].repeat(5, 1)).any()
    assert not (ours == PrefixHash(b"other").of(tokens)).any()
    assert not (ours[:, -1] == PrefixHash(b"secret").of(tokens[[1, 0, 2, 3, 4]])[:, -1]).any()
    long = np.arange(100_000, dtype=np.int32) % 7
    assert len(np.unique(PrefixHash(b"secret").of(long)[0])) == 100_000


def test_a_prompt_of_8192_tokens_costs_little_beside_a_full_index(index: TurnIndex) -> None:
    tokens = np.arange(8_300, dtype=np.int32)
    lengths = np.random.default_rng(0).integers(1, 8_000, index.most).tolist()
    for n, length in enumerate(lengths, 10**6):
        index.put(ChatTurn(n, length, f"{n:032x}", length + 9, f"{n + 1:032x}", "c"))
    times = []
    for n in range(20):
        tokens[0] = n
        begun = time.perf_counter()
        index.place(n, tokens, 8_192, "")
        times.append(time.perf_counter() - begun)
    print(f"{1000 * min(times):.2f} ms")
    assert min(times) < 0.02, "bounded; the time itself stands in docs/results.md"
