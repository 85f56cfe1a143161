"""Whose draft KV a request finds in the prefix cache, by the places of the KV cache."""

from __future__ import annotations

import pytest
import torch

from aurora_sgl.engine.draft_kv import DraftKV, LiveVersion
from aurora_sgl.engine.renewal import StaleHeads


def places(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def strange(kv: DraftKV, found: torch.Tensor, maker: int) -> int:
    return int(kv.strangers(found, 0, maker)[0])


def test_strangers_are_places_that_another_drafter_or_nobody_filled() -> None:
    kv, live = DraftKV(32, "cpu"), LiveVersion()
    kv.mark(places(1, 2, 3, 4), live.maker)
    assert strange(kv, places(1, 2, 3, 4), live.maker) == 0
    live.swapped(7)
    kv.mark(places(5, 6), live.maker)
    assert strange(kv, places(1, 2, 3, 4, 5, 6), live.maker) == 4
    assert strange(kv, places(5, 6), live.maker) == 0
    kv.mark(places(4, 5), None)  # a plain step leaves its places without draft KV
    assert strange(kv, places(5, 6), live.maker) == 1
    kv.mark(places(1, 2, 3, 4, 5), live.maker)  # SGLang gave the places away again
    assert strange(kv, places(1, 2, 3, 4, 5, 6), live.maker) == 0


def test_a_version_that_comes_back_finds_its_own() -> None:
    kv, live = DraftKV(32, "cpu"), LiveVersion()
    live.identified(3)  # the drafter that the server was started with
    kv.mark(places(1, 2), live.maker)
    live.swapped(4)
    kv.mark(places(3), live.maker)
    assert strange(kv, places(1, 2, 3), live.maker) == 2
    live.swapped(3)
    assert (live.version_id, live.swap_count) == (3, 2)
    assert strange(kv, places(1, 2), live.maker) == 0
    assert strange(kv, places(1, 2, 3), live.maker) == 1
    live.swapped(4)
    assert strange(kv, places(3), live.maker) == 0


def test_a_boot_drafter_that_nobody_identified_is_no_version_that_comes_later() -> None:
    kv, live = DraftKV(8, "cpu"), LiveVersion()
    kv.mark(places(1), live.maker)
    live.swapped(3)
    live.identified(3)  # too late: another one is live
    kv.mark(places(2), live.maker)
    live.swapped(5)
    live.swapped(3)
    assert strange(kv, places(1), live.maker) == 1
    assert strange(kv, places(2), live.maker) == 0


def test_after_a_step_that_was_not_marked_all_that_was_before_is_uncertain() -> None:
    kv, live = DraftKV(8, "cpu"), LiveVersion()
    kv.mark(places(1, 2), live.maker)
    kv.doubt()
    assert strange(kv, places(1, 2), live.maker) == 2
    kv.mark(places(1), live.maker)
    assert strange(kv, places(1, 2), live.maker) == 1


def test_a_place_that_does_not_exist_ends_nothing() -> None:
    kv = DraftKV(8, "cpu")
    kv.mark(places(3, 8, 1000, -1), 5)
    assert strange(kv, places(3, 9, 12), 5) == 0
    assert strange(kv, places(1, 2), 5) == 2
    assert strange(kv, places(), 5) == 0


def test_another_drafters_places_are_told_from_empty_ones_and_from_those_of_the_head() -> None:
    kv = DraftKV(16, "cpu")
    kv.mark(places(1, 2, 3), 0)
    kv.mark(places(4, 5), 1)
    kv.mark(places(6), None)
    found = places(1, 4, 2, 5, 6, 7)
    assert kv.strangers(found, 3, 1).tolist() == [4, 2, 2]
    assert kv.strangers(found, 0, 0).tolist() == [4, 2, 0]


PROMPT = list(range(2000))


def test_what_is_computed_again_is_a_small_part_of_what_the_cache_saves() -> None:
    heads, cached, again = StaleHeads(), 0, 0
    for number in range(3000):
        prompt = [*PROMPT[:600], number]
        if heads.renews(1 + number // 1000, "", prompt):
            again += len(prompt)
            continue
        heads.found(1 + number // 1000, 600)
        heads.met(1 + number // 1000, "", prompt, 600, in_head=True)
        cached += 600
    assert 3 * 600 <= again <= 0.005 * cached + 3 * 192
    assert not heads.renews(4, "", PROMPT[:600])
    for number in range(200):  # few requests, and a swap every tenth
        heads.met(5 + number // 10, "", [*PROMPT[:300], number], 300, in_head=True)
        assert not heads.renews(5 + number // 10, "", [*PROMPT[:300], 7])


def test_a_head_is_renewed_once_by_the_next_request_that_is_not_much_longer() -> None:
    heads = StaleHeads()
    assert not heads.renews(1, "", PROMPT[:60])
    heads.met(1, "", [*PROMPT[:40], 7, 8], 40, in_head=True)
    assert not heads.renews(1, "another", PROMPT[:60])  # the cache has it once for each key
    assert not heads.renews(1, "", [5, *PROMPT[:60]])
    assert not heads.renews(1, "", PROMPT)  # a long conversation behind the same head
    assert heads.renews(1, "", PROMPT[:60])
    assert not heads.renews(1, "", PROMPT[:60])
    heads.met(1, "", PROMPT[:40], 40, in_head=True)
    assert not heads.renews(2, "", PROMPT[:60])  # another swap


@pytest.mark.parametrize(("cached", "hits"), [(20, 1), (100, 1), (300, 4), (1500, 16)])
def test_the_longer_a_head_the_more_requests_have_to_meet_it(cached: int, hits: int) -> None:
    heads = StaleHeads()
    heads.found(1, 400_000)
    for other in range(hits):
        assert not heads.renews(1, "", [*PROMPT[:cached], 1])
        heads.met(1, "", [*PROMPT[:cached], -other], cached, in_head=True)
    assert heads.renews(1, "", [*PROMPT[:cached], 1])


def test_a_prompt_that_comes_again_is_renewed_though_its_head_was() -> None:
    heads = StaleHeads()
    for prompt in (PROMPT[:50], PROMPT[:90]):
        heads.met(1, "", prompt, len(prompt) - 1, in_head=False)
    assert not heads.renews(1, "", PROMPT[:60])
    assert heads.renews(1, "", PROMPT[:90])
    assert heads.renews(1, "", PROMPT[:50])
    assert not heads.renews(1, "", PROMPT[:50])
    for number in range(3000):  # nor do they pile up
        heads.met(1, "", [number, *PROMPT[:20]], 20, in_head=False)
    assert len(heads._heads) <= 1024
