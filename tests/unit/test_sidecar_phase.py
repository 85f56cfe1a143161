"""When speculation pays."""

from __future__ import annotations

import pytest

from aurora_sgl.sidecar import phase
from aurora_sgl.sidecar.phase import Expected


def test_break_even_is_the_ratio_of_step_times_and_unknown_while_one_is_missing() -> None:
    assert phase.break_even({"step_ms_plain": 50.0, "step_ms_spec": 65.0}) == pytest.approx(1.3)
    assert phase.break_even({"step_ms_plain": 50.0}) is None
    assert phase.break_even({"step_ms_plain": 0.0, "step_ms_spec": 65.0}) is None


def test_measured_steps_count_more_than_replay_once_there_are_enough() -> None:
    assert phase.expected(1.4, 199, 199) == Expected(1.4, "replay")
    measured = phase.expected(1.4, 200, 100)
    assert measured is not None and measured.accept_length == pytest.approx(1.5)
    assert phase.expected(None, 10, 10) is None


@pytest.mark.parametrize(
    ("mode", "needed", "hoped", "now", "name", "share"),
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
    mode: str, needed: float | None, hoped: float | None, now: str, name: str, share: float
) -> None:
    expected = Expected(hoped, "replay") if hoped else None
    decided = phase.decide(mode, 0.1, needed, expected, now)
    assert (decided.name, decided.share) == (name, share)
    assert decided.reason
