"""What was served, where a server moved between depths: one request is one witness."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from aurora_sgl.config import WatchSettings
from aurora_sgl.rollout.live_traffic import Pace, compare, paces, speeds, strata
from aurora_sgl.rollout.trial import _lengths
from aurora_sgl.rollout.watch import filled
from aurora_sgl.store.models import TrialWindow
from aurora_sgl.store.queries.request_counts import RequestCounts
from aurora_sgl.store.queries.steps import Step

NOW = datetime(2026, 11, 26, tzinfo=UTC)


def cluster(request: int, depth: int, steps: int, accepted: int) -> RequestCounts:
    return RequestCounts(
        request, "chat", depth, 4, 8, steps, accepted, NOW + timedelta(seconds=request), "greedy"
    )


def test_a_request_with_two_depths_is_one_witness_and_each_depth_has_its_own_expectation() -> None:
    before = [cluster(n, depth, 20, 8 * depth) for n in range(30) for depth in (1, 2)]
    baseline = strata(before)
    now = [cluster(n, depth, 20, 8 * depth) for n in range(100, 110) for depth in (1, 2)]
    found = compare(now, baseline)
    assert found is not None
    assert found.requests == 10
    assert found.accept_length == pytest.approx(1.6) == pytest.approx(found.expected)
    # The same steps in as many requests of one depth each tell as much.
    one_each = [cluster(n, 1 + n % 2, 40, 16 * (1 + n % 2)) for n in range(100, 110)]
    alone = compare(one_each, baseline)
    assert alone is not None and alone.error == pytest.approx(found.error, rel=0.1)


def test_more_depth_alone_is_no_better_drafter() -> None:
    baseline = strata([cluster(n, depth, 20, 8 * depth) for n in range(30) for depth in (1, 2)])
    found = compare([cluster(n, 2, 20, 16) for n in range(100, 120)], baseline)
    assert found is not None and found.difference == pytest.approx(0.0, abs=1e-9)


def test_a_window_ends_with_a_whole_request() -> None:
    rules = WatchSettings(requests=2, steps=1)
    baseline = strata([cluster(n, depth, 20, 8) for n in range(30) for depth in (1, 2)])
    some = [cluster(n, depth, 5, 2) for n in range(100, 104) for depth in (1, 2)]
    assert filled(some, baseline, rules) == 4
    assert filled(some[:3], baseline, rules) == 3  # the other depth of the last is not there yet
    assert filled(some[:2], baseline, rules) == 0


def steps(request: int, depth: int, count: int, seconds: float, kept: int) -> list[Step]:
    return [
        Step(
            request,
            at,
            NOW + timedelta(seconds=seconds * at),
            depth,
            4,
            8,
            1,
            kept - 1,
            kept,
            "greedy",
        )
        for at in range(count)
    ]


def test_speed_is_compared_in_one_draft_shape() -> None:
    shallow, deep = steps(1, 1, 41, 0.03, 2), steps(2, 2, 41, 0.04, 3)
    before = paces([*shallow, *deep])
    assert before == {
        "1/4/8/1": Pace(40, 80, pytest.approx(1.2)),
        "2/4/8/1": Pace(40, 120, pytest.approx(1.6)),
    }
    now = paces(steps(3, 2, 41, 0.04, 3))  # deeper steps take longer: nothing became slower
    found = speeds(now, before)
    assert found is not None and found[0] == pytest.approx(found[1]) == pytest.approx(75.0)
    assert speeds(now, paces(shallow)) is None


def test_a_trial_compares_accept_lengths_in_one_mix_of_draft_shapes() -> None:
    def window(**shapes: list[int]) -> TrialWindow:
        named = {name.strip("_").replace("_", "/"): sums for name, sums in shapes.items()}
        return TrialWindow(metrics={"strata": named})

    shallow = window(_1_1=[90, 45], _3_4=[10, 12])
    deep = window(_1_1=[10, 5], _3_4=[90, 108], _2_4=[50, 60])
    first, second = _lengths((shallow, deep))
    assert first == pytest.approx(second) == pytest.approx(1.85)
    assert _lengths((window(_1_1=[9, 4]), window(_3_4=[9, 4]))) == (None, None)
