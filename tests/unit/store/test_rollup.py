"""The arithmetic of roll-ups and packed columns."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_sgl.batch_sizes import batch_bucket
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.store.packing import pack_floats, pack_ints, unpack_floats, unpack_ints
from aurora_sgl.store.rollup import Tally, TallyKey, add_lists, per_position, roll_up
from tests.support import store_samples as samples

INT32 = st.integers(-(2**31), 2**31 - 1)


@given(st.lists(INT32))
def test_packed_ints_come_back(values: list[int]) -> None:
    assert unpack_ints(pack_ints(values)) == values
    assert len(pack_ints(values)) == 4 * len(values)


@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False)))
def test_packed_halves_come_back(values: list[float]) -> None:
    assert unpack_floats(pack_floats(values)) == values


def test_sixteen_nodes_take_at_most_four_hundred_bytes() -> None:
    tokens = 15 + 15 + 15 + 16  # draft tokens, parents, accepted nodes at worst, target tokens
    assert 4 * tokens + 2 * 15 <= 400


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9))
def test_positions_of_a_histogram_sum_to_the_accepted(histogram: list[int]) -> None:
    positions = per_position(histogram)
    assert sum(positions) == sum(i * steps for i, steps in enumerate(histogram))
    assert positions == sorted(positions, reverse=True)


def test_lists_of_unequal_length_are_added() -> None:
    assert add_lists([1, 2, 3], [10]) == add_lists([10], [1, 2, 3]) == [11, 2, 3]


def test_batches_fall_into_powers_of_two() -> None:
    sizes = (1, 2, 3, 4, 5, 8, 9, 64, 65)
    assert [batch_bucket(size) for size in sizes] == [1, 2, 4, 4, 8, 8, 16, 64, 128]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=60), st.integers(0, 60))
def test_squares_grow_to_those_of_whole_requests_in_any_cut(
    steps: list[tuple[int, int]], cut: int
) -> None:
    events = [samples.chain_step(number, i, a) for i, (number, a) in enumerate(steps)]
    tallies: dict[TallyKey, Tally] = {}
    totals = [0, 0, 0, 0]
    for part in (events[:cut], events[cut:]):
        minutes, _ = roll_up(part, 7, dict.fromkeys((e.request_id for e in part), "d"), tallies)
        for minute in minutes.values():
            for i, value in enumerate(
                (
                    minute.by_shape.sum_steps_squared,
                    minute.by_shape.sum_accepted_squared,
                    minute.by_shape.sum_steps_accepted,
                    minute.by_shape.requests,
                )
            ):
                totals[i] += value
    by_request: dict[int, list[int]] = {}
    for number, a in steps:
        by_request.setdefault(number, []).append(a)
    assert totals == [
        sum(len(a) ** 2 for a in by_request.values()),
        sum(sum(a) ** 2 for a in by_request.values()),
        sum(len(a) * sum(a) for a in by_request.values()),
        len(by_request),
    ]


def test_the_interval_of_a_ratio_is_the_textbook_one() -> None:
    """Three requests worked by hand: n = 10, 20, 30 and y = 5, 12, 13, so R = 0.5 and the
    residuals y - R n are 0, 2, -2."""
    n, y = [10, 20, 30], [5, 12, 13]
    interval = AcceptCounts(
        3,
        60,
        30,
        sum(a * a for a in n),
        sum(b * b for b in y),
        sum(a * b for a, b in zip(n, y, strict=True)),
    ).interval
    error = 1.959963984540054 * math.sqrt(8 * 3 / 2) / 60
    assert interval == pytest.approx((1.5 - error, 1.5 + error))


def test_one_request_gives_no_interval() -> None:
    assert AcceptCounts(1, 10, 5, 100, 25, 50).interval is None
    assert AcceptCounts().interval is None
