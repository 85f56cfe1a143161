"""Which traces a budget keeps: with what they need, and in shares."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_sgl.split_place import GATE_SHARE, place
from aurora_sgl.store.pruning.kept import HELD_OUT_SHARE, PINNED_SHARE, HeldTrace, victims

START = datetime(2026, 11, 1, tzinfo=UTC)
TRAINED = next(key for key in map(str, range(99)) if place(key) > GATE_SHARE)
HELD_OUT = next(key for key in map(str, range(99)) if place(key) < GATE_SHARE)


def trace(
    number: int, *, size: int = 100, donor: int | None = None, pinned: bool = False,
    key: str = TRAINED,
) -> HeldTrace:  # fmt: skip
    """Later numbers are newer."""
    at = START + timedelta(seconds=number)
    return HeldTrace(number, f"t/{number}", size, at, donor, pinned, key)


def gone(traces: list[HeldTrace], budget: int) -> list[int]:
    return [one.request_id for one in victims(traces, budget)]


def test_the_oldest_go_first_and_none_while_all_fit() -> None:
    traces = [trace(number) for number in range(1, 6)]
    assert gone(traces, 500) == [] and gone(traces, 499) == [1] and gone(traces, 250) == [1, 2, 3]
    assert gone(traces, 99) == [1, 2, 3, 4, 5]


def test_the_trace_of_a_shared_system_prompt_stays_while_a_later_one_needs_it() -> None:
    """The budget holds ten of 40: the first and the newest nine."""
    traces = [trace(1), *(trace(number, donor=1) for number in range(2, 41))]
    assert gone(traces, 1000) == list(range(2, 32))


def test_a_chat_goes_as_a_whole_when_its_turns_do_not_fit() -> None:
    turns = [trace(1), trace(2, donor=1), trace(3, donor=2)]
    assert gone([*turns, trace(4), trace(5)], 499) == [1, 2, 3], "the third needs both others"
    assert gone([*turns, trace(4), trace(5)], 500) == []


def test_held_out_traces_keep_their_share_and_more_compete_by_age() -> None:
    held_out = [trace(number, key=HELD_OUT) for number in range(1, 6)]
    traces = [*held_out, *(trace(number) for number in range(6, 30))]
    assert gone(traces, 1000) == [1, 2, 3, *range(6, 22)]
    assert HELD_OUT_SHARE * 1000 == 200


def test_what_a_held_out_trace_needs_stays_too() -> None:
    traces = [trace(1), trace(2, donor=1, key=HELD_OUT), *(trace(n) for n in range(3, 30))]
    assert gone(traces, 1000) == list(range(3, 22))


def test_pinned_traces_stay_up_to_their_share() -> None:
    traces = [trace(number, pinned=number < 5) for number in range(1, 30)]
    assert PINNED_SHARE * 1000 == 250
    assert gone(traces, 1000) == [1, 2, *range(5, 22)]


def test_a_donor_that_is_gone_keeps_nothing() -> None:
    assert gone([trace(2, donor=1), trace(3), trace(4)], 200) == [2]


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, 30), st.booleans(), st.booleans()),
        max_size=30,
    ),
    st.integers(0, 3000),
)
def test_what_stays_fits_and_lacks_nothing(
    drawn: list[tuple[int, int, bool, bool]], budget: int
) -> None:
    traces = [
        trace(
            number, size=size, donor=donor if donor < number else None, pinned=pinned,
            key=HELD_OUT if held_out else TRAINED,
        )
        for number, (size, donor, pinned, held_out) in enumerate(drawn)
    ]  # fmt: skip
    kept = {one.request_id: one for one in traces}
    for one in victims(traces, budget):
        del kept[one.request_id]
    assert sum(one.bytes for one in kept.values()) <= budget
    assert all(one.donor_id is None or one.donor_id in kept for one in kept.values())


@pytest.mark.parametrize("count", [1000, 1500])
def test_of_many_some_more_go_at_once(count: int) -> None:
    left = count - len(victims([trace(number) for number in range(count)], 99_000))
    assert left == (990 if count <= 1000 else 974)
