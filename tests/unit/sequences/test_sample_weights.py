"""What counts how much in training, in which order, and which prompts are nearly the same."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch

from aurora_sgl.clock import utc_now
from aurora_sgl.drafter import vocabulary
from aurora_sgl.sequences.near_duplicates import near_duplicates
from aurora_sgl.sequences.sample_weights import by_recency, by_rejection
from aurora_sgl.sequences.splits import sides, split_of
from aurora_sgl.store.queries.requests import RecentRequest
from aurora_sgl.training.batches import batches

ROW = RecentRequest(
    request_id=1, uri="u", start=0, end=9, output_start=4, greedy=True, accept_rule="greedy",
    domain="d", conversation_hash="", prompt_sha256="p", head_sha256="h", completion_tokens=5,
    admitted_at=utc_now(), finished_at=utc_now(), sampling={}, prompt_tokens=4, sha256="", bytes=1,
)  # fmt: skip


def rows(count: int) -> list[RecentRequest]:
    return [
        replace(ROW, request_id=n, prompt_sha256=f"p{n}", finished_at=utc_now() - timedelta(n))
        for n in range(count)
    ]


def test_recent_requests_weigh_twice_those_of_a_half_life_ago_and_one_on_average() -> None:
    weights = by_recency(rows(30), 10)
    assert weights[0] == pytest.approx(2 * weights[10]) == pytest.approx(4 * weights[20])
    assert sum(weights.values()) == pytest.approx(30)
    assert set(by_recency(rows(3), 0).values()) == {1.0} and by_recency([], 5) == {}


def step(position: int, accepted: int, rejected_at: int, depth: int = 4) -> dict[str, int]:
    return {
        "position": position, "accepted": accepted, "depth": depth,
        "first_rejected_at": rejected_at,
    }  # fmt: skip


def test_rows_right_after_a_rejection_weigh_most_where_the_next_draft_failed_too() -> None:
    # Positions are those of the token after the root; the draft comes from the row before it.
    steps = [step(5, 1, 2), step(7, 0, 1), step(8, 4, 0), step(13, 0, 1), step(14, 2, 3)]
    weight = by_rejection(steps, 16, 4, 3.0)
    raw = torch.ones(16)
    raw[5], raw[6], raw[12] = 3.0, 1.0, 2.0
    raw[3:] /= raw[3:].mean()
    torch.testing.assert_close(weight, raw)
    assert float(weight[3:].mean()) == pytest.approx(1)
    torch.testing.assert_close(by_rejection(steps, 16, 4, 1.0), torch.ones(16))
    plain = [step(5, 0, 0, depth=0), step(6, 0, 0, depth=0)]
    torch.testing.assert_close(by_rejection(plain, 16, 4, 3.0), torch.ones(16))


def test_a_pass_holds_every_request_once_in_an_order_that_seed_and_pass_fix() -> None:
    for options in ({"size": 1}, {"size": 4}, {"tokens": 25, "length": lambda index: 10}):
        made = batches(11, seed=3, number=1, **options)  # type: ignore[arg-type]
        assert sorted(index for batch in made for index in batch) == list(range(11))
        assert made == batches(11, seed=3, number=1, **options)  # type: ignore[arg-type]
        assert made != batches(11, seed=3, number=2, **options)  # type: ignore[arg-type]
        assert made != batches(11, seed=4, number=1, **options)  # type: ignore[arg-type]
    sizes = [len(batch) for batch in batches(11, seed=0, number=0, tokens=25, length=lambda i: 10)]
    assert sizes == [3, 3, 3, 2]


def prompt(words: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5000, words)


def test_prompts_that_differ_in_a_word_are_alike_and_others_are_not() -> None:
    form = prompt(40, 99)  # a system prompt that all share says nothing of what is asked
    prompts = {n: np.concatenate([form, prompt(60, n)]) for n in range(40)}
    changed = prompts[3].copy()
    changed[70] += 1
    prompts[100] = changed
    prompts[101] = prompts[7].copy()
    prompts[102] = np.concatenate([form, prompt(60, 9)[:30], prompt(60, 500)[:30]])
    found = near_duplicates(prompts)
    assert set(found) == {3, 100, 7, 101}
    assert found[3] == found[100] != found[7] == found[101]
    assert (
        near_duplicates({5: prompts[3], 6: changed})[5]
        == near_duplicates({8: changed, 9: prompts[3]})[8]
    )


def test_no_prompt_is_trained_on_that_a_held_out_one_nearly_repeats() -> None:
    shares = {"dev_share": 0.2, "gate_share": 0.3}
    served = [replace(ROW, request_id=n, prompt_sha256=f"p{n}") for n in range(300)]
    groups = {n: f"alike:{n // 3}" for n in range(300)}
    found = sides(served, groups, **shares)
    for begin in range(0, 300, 3):
        assert len({found[n] for n in range(begin, begin + 3)} - {"duplicate"}) <= 1
    for n, side in found.items():
        assert side in ("duplicate", split_of(f"p{n}", **shares)), "nobody changes sides"
    assert {"train", "dev", "gate", "duplicate"} == set(found.values())
    same = [replace(row, conversation_hash="c") for row in served[:9]]
    assert len(set(sides(same, groups, **shares).values())) == 1


def test_a_renewed_vocabulary_exchanges_only_tokens_that_are_rarer_than_those_that_come() -> None:
    old = torch.tensor([1, 2, 3, 4, 5])
    new = vocabulary.renew(old, {1: 9, 2: 1, 7: 5, 8: 2, 9: 1}, 20, always=[3])
    assert new.tolist() == [1, 2, 3, 7, 8]
    assert vocabulary.renew(old, {}, 20).tolist() == old.tolist()
    assert vocabulary.renew(old, {30: 9}, 20).tolist() == old.tolist(), "beyond the target's"
