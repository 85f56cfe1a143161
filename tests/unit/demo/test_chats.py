"""Chats of the demo: the same prompt goes on in the same way, and a number of requests is kept."""

import pytest

from aurora_sgl.demo.chats import FOLLOW_UPS, limited, with_turns
from aurora_sgl.demo.prompts import Prompt, sample_prompts, to_serve

CHATS = with_turns(to_serve(sample_prompts()), 4)


def test_each_prompt_becomes_a_chat_of_its_own_domains_turns() -> None:
    assert all(len(set(chat.follow_ups)) == 3 for chat in CHATS)
    assert all(set(chat.follow_ups) <= set(FOLLOW_UPS[chat.domain]) for chat in CHATS)
    assert with_turns(to_serve(sample_prompts()), 4) == CHATS
    assert len({chat.follow_ups for chat in CHATS}) > 3  # not one form for all


def test_follow_ups_of_the_users_own_are_kept_and_one_turn_adds_none() -> None:
    own = Prompt("law", "May I?", 10, follow_ups=("Why?",))
    other = Prompt("law", "Must I?", 10)
    assert with_turns([own, other], 1) == [own, other]
    assert with_turns([own], 4) == [own]
    assert len(with_turns([other], 3)[0].follow_ups) == 2


@pytest.mark.parametrize("requests", [1, 2, 3, 4, 5, 7, 8, 401])
def test_chats_end_at_the_number_of_requests(requests: int) -> None:
    sent = list(limited(CHATS, requests))
    assert sum(1 + len(chat.follow_ups) for chat in sent) == requests
    assert [chat.prompt for chat in sent] == [chat.prompt for chat in CHATS[: len(sent)]]


def test_without_a_number_all_are_sent() -> None:
    assert list(limited(CHATS, None)) == CHATS
