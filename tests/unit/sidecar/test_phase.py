"""When speculation pays."""

from __future__ import annotations

import pytest

from aurora_sgl.sidecar import phase
from aurora_sgl.sidecar.phase import Expected
from aurora_sgl.step_cost import StepCost, by_size, is_worth


def break_even(counters: dict[str, float]) -> float | None:
    return StepCost.of(counters).break_even


def test_break_even_is_the_ratio_of_step_times_and_unknown_while_one_is_missing() -> None:
    assert break_even({"step_ms_plain": 50.0, "step_ms_spec": 65.0}) == pytest.approx(1.3)
    assert break_even({"step_ms_plain": 50.0}) is None
    assert break_even({"step_ms_plain": 0.0, "step_ms_spec": 65.0}) is None


def test_break_even_is_that_of_the_batch_size_where_drafts_pay_soonest() -> None:
    counters = {"break_even_16": 2.2, "break_even_1": 1.3, "step_ms_plain": 9.0}
    assert by_size(counters, "break_even") == {1: 1.3, 16: 2.2}
    assert break_even(counters) == 1.3
    decided = phase.decide("auto", 0.1, StepCost.of(counters), Expected(1.5, "replay"), "")
    assert decided.name == "speculating"
    assert decided.reason.endswith("break-even 1.30 (1 at once: 1.30, 9 to 16 at once: 2.20)")


def test_where_the_engine_knows_what_drafts_bring_that_decides() -> None:
    counters = {"gain_4": 0.94, "gain_1": 1.31, "break_even_1": 1.4, "depth_1": 2.0}
    assert by_size(counters, "gain") == {1: 1.31, 4: 0.94}
    expected = Expected(1.2, "replay")  # of a mixture of depths: says little
    decided = phase.decide("auto", 0.1, StepCost.of(counters), expected, "")
    assert decided.name == "speculating"
    assert decided.reason.endswith("plain decoding: 1.31 with 1 at once, 0.94 with 3 to 4 at once")
    assert not is_worth(1.01, speculates=False)
    assert is_worth(1.01, speculates=True)


def test_measured_steps_count_more_than_replay_once_there_are_enough() -> None:
    assert phase.expected(1.4, 199, 199) == Expected(1.4, "replay")
    measured = phase.expected(1.4, 200, 100)
    assert measured is not None and measured.accept_length == pytest.approx(1.5)
    assert phase.expected(None, 10, 10) is None


@pytest.mark.parametrize(
    ("mode", "needed", "length", "now", "name", "share"),
    [
        ("on", None, None, "", "speculating", 1.0),
        ("off", 1.3, 2.0, "speculating", "off", 0.0),
        ("auto", None, 2.0, "", "exploring", 0.1),
        ("auto", 1.3, None, "", "exploring", 0.1),
        ("auto", 1.3, 1.31, "exploring", "exploring", 0.1),
        ("auto", 1.3, 1.33, "exploring", "speculating", 1.0),
        ("auto", 1.3, 1.31, "speculating", "speculating", 1.0),
        ("auto", 1.3, 1.29, "speculating", "exploring", 0.1),
    ],
)
def test_all_steps_speculate_only_when_the_accept_length_is_above_break_even(
    mode: str, needed: float | None, length: float | None, now: str, name: str, share: float
) -> None:
    expected = Expected(length, "replay") if length else None
    cost = StepCost.of({"break_even_1": needed} if needed else {})
    decided = phase.decide(mode, 0.1, cost, expected, now)
    assert (decided.name, decided.share) == (name, share)
    assert decided.reason
