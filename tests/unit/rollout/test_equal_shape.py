"""Two versions on the strata that both served: weights, intervals, and what is left out."""

from __future__ import annotations

import random

import pytest
from scipy.stats import ttest_ind

from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.rollout.equal_shape import PositionShares, of_strata
from aurora_sgl.store.queries.request_counts import RequestCounts
from tests.unit.rollout.test_live_traffic import NOW


def counts(accepted: list[int], steps: int = 10) -> AcceptCounts:
    rows = [RequestCounts(n, "chat", 3, 1, 4, steps, y, NOW, "greedy")
            for n, y in enumerate(accepted)]  # fmt: skip
    return AcceptCounts.of(rows)


def test_the_mix_of_traffic_of_neither_version_counts() -> None:
    easy, hard = [18, 20, 22], [4, 5, 6]
    mostly_easy = of_strata([(counts(easy * 50), counts(easy)), (counts(hard), counts(hard * 50))])
    assert mostly_easy.difference == pytest.approx(0)
    assert mostly_easy.accept_length == pytest.approx((2.25, 2.25))
    better = of_strata(
        [(counts(easy), counts([y + 2 for y in easy])), (counts(hard), counts(hard))]
    )
    assert better.difference == pytest.approx(0.1)  # 0.2 in one of two strata


def test_the_interval_of_one_stratum_is_that_of_two_samples_of_unequal_spread() -> None:
    rng = random.Random(1)
    first, second = ([rng.randrange(low, low + wide) for _ in range(count)]
                     for low, wide, count in ((4, 5, 12), (6, 12, 7)))  # fmt: skip
    one = of_strata([(counts(first), counts(second))])
    welch = ttest_ind([y / 10 for y in second], [y / 10 for y in first], equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert (one.ci_low, one.ci_high) == pytest.approx((interval.low, interval.high))
    assert one.strata == 1 and one.requests == (12, 7)


def test_a_stratum_whose_requests_are_all_alike_has_no_width() -> None:
    one = of_strata([(counts([5, 5, 5]), counts([8, 8, 8]))])
    assert (one.ci_low, one.difference, one.ci_high) == pytest.approx((0.3, 0.3, 0.3))


def test_the_rate_at_a_depth_is_of_the_steps_that_came_so_far() -> None:
    shares = PositionShares(3, 1, (100, 100), ((0.6, 0.3, 0.0), (0.5, 0.0, 0.0)))
    assert shares.rates(0) == pytest.approx([0.6, 0.5, 0.0])
    assert shares.rates(1) == [0.5, 0.0, None]
