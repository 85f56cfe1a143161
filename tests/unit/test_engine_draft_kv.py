"""Whose draft KV a request finds in the prefix cache, by the places of the KV cache."""

from __future__ import annotations

import torch

from aurora_sgl.engine.draft_kv import DraftKV, Live


def places(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def strange(kv: DraftKV, found: torch.Tensor, maker: int) -> int:
    return int(kv.strangers(found, 0, maker)[0])


def test_strangers_are_places_that_another_drafter_or_nobody_filled() -> None:
    kv, live = DraftKV(32, "cpu"), Live()
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
    kv, live = DraftKV(32, "cpu"), Live()
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
    kv, live = DraftKV(8, "cpu"), Live()
    kv.mark(places(1), live.maker)
    live.swapped(3)
    live.identified(3)  # too late: another one is live
    kv.mark(places(2), live.maker)
    live.swapped(5)
    live.swapped(3)
    assert strange(kv, places(1), live.maker) == 1
    assert strange(kv, places(2), live.maker) == 0


def test_after_a_step_that_was_not_marked_all_that_was_before_is_uncertain() -> None:
    kv, live = DraftKV(8, "cpu"), Live()
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
