"""The simulated watch ends, and finds what it should find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aurora_sgl.config import WatchSettings
from aurora_sgl.rollout.live_traffic import strata
from aurora_sgl.rollout.watch import judge
from aurora_sgl.store.queries.request_counts import RequestCounts
from benchmarks.watch import KINDS, MIXES, served, watch, window

RULES = WatchSettings()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("baseline", [0, 1, 6, 100])
def test_a_window_fills_with_requests_of_ids_of_their_own(baseline: int) -> None:
    rng = np.random.default_rng(0)
    before = strata(served(rng, baseline, 0.0))
    for gain in KINDS.values():
        found = window(rng, before, RULES, gain)
        assert len({one.request_id for one in found}) == len(found) >= RULES.requests


def bare(found: list[RequestCounts]) -> list[RequestCounts]:
    return [replace(one, accept_rule="") for one in found]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mix", [MIXES[2], MIXES[4]])
def test_a_mix_of_greedy_and_sampled_takes_back_no_equal_version_and_spares_no_damaged_one(
    mix: tuple[float, float],
) -> None:
    rng = np.random.default_rng(2)
    tries = 40
    equal = sum(bool(watch(rng, RULES, 40, KINDS["equal"], mix)) for _ in range(tries))
    assert equal <= 6  # with a chance of 5% each, 40 have more in 3 of 1,000 cases
    before = strata(served(rng, 40, 0.0, sampled=mix[0]))
    damaged = [watch(rng, RULES, 40, KINDS["damaged"], mix) for _ in range(20)]
    assert sum(map(bool, damaged)) >= 19
    if mix[1] - mix[0] > 0.6:  # what it would come to without the rule
        blind = strata(bare(served(rng, 400, 0.0, sampled=mix[0])))
        windows = [bare(window(rng, before, RULES, 0.0, mix[1])) for _ in range(40)]
        verdicts = [judge(one, blind, RULES)[0].verdict for one in windows]
        assert sum(verdict != "pass" for verdict in verdicts) >= 12


@pytest.mark.timeout(60)
def test_every_watch_ends_and_takes_back_what_is_damaged_only() -> None:
    rng = np.random.default_rng(1)
    ends = {kind: [watch(rng, RULES, 20, gain) for _ in range(20)] for kind, gain in KINDS.items()}
    assert set(ends["damaged"]) == {1}
    assert sum(map(bool, ends["equal"])) <= 4 and sum(map(bool, ends["5% better"])) <= 4
    assert all(0 <= end <= RULES.windows for row in ends.values() for end in row)
