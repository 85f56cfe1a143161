"""The simulated watch ends, and finds what it should find."""

from __future__ import annotations

import numpy as np
import pytest

from aurora_sgl.config import WatchSettings
from aurora_sgl.rollout.live_traffic import strata
from benchmarks.watch import KINDS, served, watch, window

RULES = WatchSettings()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("baseline", [0, 1, 6, 100])
def test_a_window_fills_with_requests_of_ids_of_their_own(baseline: int) -> None:
    rng = np.random.default_rng(0)
    before = strata(served(rng, baseline, 0.0))
    for gain in KINDS.values():
        found = window(rng, before, RULES, gain)
        assert len({one.request_id for one in found}) == len(found) >= RULES.requests


@pytest.mark.timeout(60)
def test_every_watch_ends_and_takes_back_what_is_damaged_only() -> None:
    rng = np.random.default_rng(1)
    ends = {kind: [watch(rng, RULES, 20, gain) for _ in range(20)] for kind, gain in KINDS.items()}
    assert set(ends["damaged"]) == {1}
    assert sum(map(bool, ends["equal"])) <= 4 and sum(map(bool, ends["5% better"])) <= 4
    assert all(0 <= end <= RULES.windows for row in ends.values() for end in row)
