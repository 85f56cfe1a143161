"""How long the sidecar waits for an engine that takes a drafter in pieces between its steps."""

from __future__ import annotations

import pytest

from aurora_sgl import wire
from aurora_sgl.sidecar.swap.attempt import DEADLINE_SECONDS, patience_for

PIECES = 1.5e6  # bytes that a step takes at least


def hello(**counters: float) -> wire.Hello:
    return wire.Hello(
        boot_id=1, pid=1, server={}, live_version_id=1, swap_count=0, dropped=0,
        counters=counters, notices={},
    )  # fmt: skip


@pytest.mark.parametrize("megabytes", [20, 1000, 3000])
@pytest.mark.parametrize("step", [0.005, 0.1, 0.45, 2.0])
def test_it_waits_for_the_steps_that_the_pieces_take(megabytes: int, step: float) -> None:
    """Twice through the file, and steps may become twice as long meanwhile."""
    patience = patience_for(megabytes * 1_000_000, hello(step_ms=1000 * step))
    assert patience >= 0.999 * DEADLINE_SECONDS + 1.999 * megabytes * 1e6 / PIECES * 2 * step
    assert patience <= 1.001 * DEADLINE_SECONDS + 4.001 * megabytes * 1e6 / PIECES * max(0.1, step)


def test_an_engine_that_made_no_step_yet_has_the_time_of_short_ones() -> None:
    assert patience_for(0, hello()) == DEADLINE_SECONDS
    assert patience_for(1_000_000_000, hello()) == pytest.approx(DEADLINE_SECONDS + 133, abs=1)
