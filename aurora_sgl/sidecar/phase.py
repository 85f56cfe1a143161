"""How much to speculate: a bounded share of the steps until drafts pay, then all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aurora_sgl.intervals import accept_length
from aurora_sgl.wire import by_size

#: How far above break-even the expected accept length must be before all steps speculate. Once
#: they do, they go on until it falls below break-even itself, so that noise does not flip it.
MARGIN = 1.02
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


def break_even(counters: Mapping[str, float]) -> float | None:
    """The accept length at which a speculative step pays for itself, where it does so soonest.

    Median time of a speculative step (drafts and verify) over that of a plain one, as the engine
    measured them, at the batch size where that is least: the engine itself leaves drafts out at
    those where they lose. None while one of them is missing.
    """
    sizes = by_size(counters)
    if sizes:
        return min(sizes.values())
    plain, spec = counters.get("step_ms_plain", 0.0), counters.get("step_ms_spec", 0.0)
    return spec / plain if plain > 0 and spec > 0 else None


def expected(
    replayed: float | None, steps: int, accepted: int, enough: int = ENOUGH_STEPS
) -> Expected | None:
    """From live steps of this version since its swap (not mixed), else from its replay."""
    if steps >= enough:
        return Expected(accept_length(accepted, steps), f"measured over {steps} steps")
    if replayed is not None:
        return Expected(replayed, "replay")
    return None


def decide(
    mode: str,
    explore_share: float,
    needed: float | None,  # break-even accept length
    hoped: Expected | None,
    now: str,
    plain_steps_possible: bool = True,
    sizes: Mapping[int, float] | None = None,  # break-even by group of batch sizes, to be told
    gains: Mapping[int, float] | None = None,  # speed with drafts over that without, the same way
) -> Phase:
    """The phase for ``Settings.speculation`` = ``mode``; ``now`` is the present phase's name."""
    if not plain_steps_possible:
        return Phase(SPECULATING, 1.0, "this server can't make steps without drafts")
    if mode == "on":
        return Phase(SPECULATING, 1.0, "speculation is set to on")
    if mode == "off":
        return Phase(OFF, 0.0, "speculation is set to off")
    if needed is None:
        return Phase(EXPLORING, explore_share, "step times are not known yet")
    if hoped is None:
        return Phase(EXPLORING, explore_share, "accept length of the live drafter not known yet")
    gain = max(gains.values()) if gains else hoped.accept_length / needed
    said = f"accept length {hoped.accept_length:.2f} ({hoped.source})"
    if gains:
        told = ", ".join(f"{value:.2f} with {_requests(group)}" for group, value in gains.items())
        said += f"; speed against plain decoding: {told}"
    else:
        said += f", break-even {needed:.2f}"
        if sizes and len(sizes) > 1:
            told = ", ".join(f"{_requests(group)}: {bar:.2f}" for group, bar in sizes.items())
            said += f" ({told})"
    if gain > (1.0 if now == SPECULATING else MARGIN):
        return Phase(SPECULATING, 1.0, f"drafts pay: {said}")
    return Phase(EXPLORING, explore_share, f"drafts do not pay yet: {said}")


def _requests(group: int) -> str:
    """A group of batch sizes in words; it is named by the largest of them."""
    return f"{group} at once" if group <= 2 else f"{group // 2 + 1} to {group} at once"
