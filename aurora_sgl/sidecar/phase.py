"""How much to speculate: until speculation is faster than decoding without it, a bounded share of
the steps carries drafts; then all of them do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aurora_sgl.intervals import accept_length
from aurora_sgl.step_cost import StepCost, is_worth

#: Speculative steps after a swap from which what was measured counts more than replay.
ENOUGH_STEPS = 200

EXPLORING, SPECULATING, OFF = "exploring", "speculating", "off"


@dataclass(frozen=True)
class Phase:
    name: str  # exploring | speculating | off
    share: float  # of the verify steps that may carry drafts
    reason: str


@dataclass(frozen=True)
class Expected:
    """The accept length that the live version is expected to have."""

    accept_length: float
    source: str  # for the reason that people read


def expected(
    replayed: float | None, steps: int, accepted: int, enough: int = ENOUGH_STEPS
) -> Expected | None:
    """From live steps of this version since its swap (not mixed), else from its replay."""
    if steps >= enough:
        return Expected(accept_length(accepted, steps), f"measured over {steps} steps")
    if replayed is not None:
        return Expected(replayed, "replay")
    return None


def measured(counters: Mapping[str, float]) -> Expected | None:
    """From what the engine itself counted, for a drafter that has no version."""
    length = counters.get("accept_length")
    return Expected(float(length), "measured by the server") if length else None


def decide(
    mode: str,
    explore_share: float,
    cost: StepCost,
    expected: Expected | None,
    now: str,
    plain_steps_possible: bool = True,
) -> Phase:
    """The phase for ``Settings.speculation`` = ``mode``; ``now`` is the present phase's name."""
    if not plain_steps_possible:
        return Phase(SPECULATING, 1.0, "this server can't make steps without drafts")
    if mode == "on":
        return Phase(SPECULATING, 1.0, "speculation is set to on")
    if mode == "off":
        return Phase(OFF, 0.0, "speculation is set to off")
    if cost.break_even is None:
        return Phase(EXPLORING, explore_share, "step times are not known yet")
    if expected is None:
        return Phase(EXPLORING, explore_share, "accept length of the live drafter not known yet")
    gain = max(cost.gains.values(), default=expected.accept_length / cost.break_even)
    evidence = _evidence(cost, expected)
    if is_worth(gain, speculates=now == SPECULATING):
        return Phase(SPECULATING, 1.0, f"speculation is faster: {evidence}")
    return Phase(EXPLORING, explore_share, f"speculation is not faster yet: {evidence}")


def _evidence(cost: StepCost, expected: Expected) -> str:
    length = f"accept length {expected.accept_length:.2f} ({expected.source})"
    if cost.gains:
        gains = ", ".join(f"{gain:.2f} with {_requests(size)}" for size, gain in cost.gains.items())
        return f"{length}; speed against plain decoding: {gains}"
    bars = ", ".join(f"{_requests(size)}: {bar:.2f}" for size, bar in cost.break_evens.items())
    by_size = f" ({bars})" if len(cost.break_evens) > 1 else ""
    return f"{length}, break-even {cost.break_even:.2f}{by_size}"


def _requests(group: int) -> str:
    """A group of batch sizes in words; it is named by the largest of them."""
    return f"{group} at once" if group <= 2 else f"{group // 2 + 1} to {group} at once"
