"""Conversations stay in one part of the prefix cache, whatever is traced of them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from aurora_sgl.engine.conversations import Conversations, ConversationTurn, Place

HEAD = list(range(500, 620))  # a system prompt that all share


def prompts(seed: int, turns: int = 6) -> Iterator[list[int]]:
    """The prompts of a chat: each goes on from the whole prompt before it, and its answer."""
    draw = random.Random(seed)
    prompt = list(HEAD)
    for _ in range(turns):
        prompt += [draw.randrange(500) for _ in range(draw.randrange(3, 40))]
        yield list(prompt)
        prompt += [draw.randrange(500) for _ in range(draw.randrange(1, 60))]


def place(of: Conversations, prompt: list[int], share: float, *, fits: bool = True) -> Place:
    turn = of.find(prompt)
    return of.keep(turn, traced=of.wants_trace(turn, share) and fits)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("named", [False, True])
def test_all_turns_of_a_chat_are_in_one_place_and_a_share_of_the_chats_is_traced(
    share: float, named: bool
) -> None:
    known = Conversations()
    chats = [list(prompts(seed)) for seed in range(200)]
    places: list[set[Place]] = [set() for _ in chats]
    for number in range(6):  # their turns come between each other
        for chat, one in enumerate(chats):
            turn = known.find(one[number], f"talk {chat} \ud83d" if named else "")
            places[chat].add(known.keep(turn, traced=known.wants_trace(turn, share)))
    assert all(len(one) == 1 for one in places)
    traced = sum(one == {Place.TRACED} for one in places) / len(places)
    assert traced == pytest.approx(share, abs=0.1 if named else 0.01)


def test_a_chat_that_is_refused_once_stays_where_it_is_and_is_not_traced_again() -> None:
    known = Conversations()
    first, second, third, fourth, *_ = prompts(1)
    assert place(known, first, 1.0) is Place.TRACED
    assert place(known, second, 1.0, fits=False) is Place.HELD
    assert place(known, third, 1.0) is Place.HELD
    assert place(known, fourth, 1.0) is Place.HELD
    begun, later, *_ = prompts(2)
    assert place(known, begun, 1.0, fits=False) is Place.PLAIN
    assert place(known, later, 1.0) is Place.PLAIN


def test_after_a_trace_that_broke_off_no_later_turn_is_traced() -> None:
    known = Conversations()
    first, second, *_ = prompts(3)
    other = next(prompts(4))
    turn = known.find(first)
    known.keep(turn, traced=True)
    place(known, other, 1.0)
    known.hold(turn.key)
    assert place(known, second, 1.0) is Place.HELD
    assert known.find(other).again is Place.TRACED
    known.hold(12345)  # of no turn that is remembered


def test_the_same_prompt_again_stays_and_a_branch_goes_where_its_last_turn_was() -> None:
    known = Conversations()
    first, second, third, *_ = prompts(5)
    assert place(known, first, 1.0) is Place.TRACED
    assert place(known, first, 1.0, fits=False) is Place.HELD  # such as one without consent
    assert place(known, second, 1.0) is Place.HELD  # which may go on from that answer
    assert place(known, [*third[:-1], 7], 1.0) is Place.HELD
    assert place(known, first, 1.0) is Place.TRACED  # its own prompt was traced whole


def test_a_prompt_that_comes_again_is_chosen_anew_until_it_is_traced() -> None:
    """It was cached where it was, and will be where it is: nothing is lost for long."""
    known = Conversations()
    first, second, *_ = prompts(6)
    assert place(known, first, 1.0, fits=False) is Place.PLAIN  # such as one without consent
    assert place(known, first, 1.0) is Place.TRACED
    assert place(known, first, 0.0) is Place.TRACED
    assert place(known, second, 0.0) is Place.TRACED


def test_a_shared_system_prompt_says_nothing_about_a_chat() -> None:
    known = Conversations()
    assert place(known, [*HEAD, 1, 2, 3], 1.0) is Place.TRACED
    assert place(known, [*HEAD, 1, 2, 4, 5], 0.0) is Place.PLAIN
    assert known.find([*HEAD, 9]).before is None


@pytest.mark.parametrize("prompt", [None, [], [0], [0, 0], [0] * 40, [2**31 - 1] * 5])
def test_odd_prompts(prompt: list[int] | None) -> None:
    known = Conversations(remembered=4)
    turn = known.find(prompt)
    assert turn.before is None and known.keep(turn, traced=True) is Place.TRACED
    assert known.find(prompt).again is (Place.TRACED if prompt else None)
    if prompt:  # one that is shorter or longer by the same token is another
        assert known.find(prompt[:-1]).again is None
        assert known.find(prompt[:-1]).before is None


def test_old_turns_are_forgotten() -> None:
    known = Conversations(remembered=8)
    turns = [[n, n + 1, n + 2] for n in range(20)]
    for one in turns:
        place(known, one, 1.0)
    assert known.find(turns[0]).again is None
    assert all(known.find(one).again is Place.TRACED for one in turns[-8:])


def test_a_turn_without_a_prompt_is_chosen_by_its_name() -> None:
    known = Conversations()
    named = [known.find(None, f"session {n}") for n in range(400)]
    chosen = [known.wants_trace(turn, 0.3) for turn in named]
    assert chosen == [known.wants_trace(turn, 0.3) for turn in named]
    assert 0.2 < sum(chosen) / 400 < 0.4
    assert known.keep(ConversationTurn(0, 0, None), traced=False) is Place.PLAIN
