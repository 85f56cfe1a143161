"""The interface between the trainer and an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Step:
    """One unrolled step of one request: what the drafter says, and what the target would say.

    Row j of step k drafts from the j-th base row of the request; deeper steps have fewer rows
    (the log ends), always the first ones.
    """

    log_q: torch.Tensor  # [rows, draft_vocab] float32: the drafter, normalised
    log_p: torch.Tensor  # [rows, draft_vocab] float32: the target, renormalised to the vocabulary
    mass: torch.Tensor | None  # [rows]: the target's probability of the draft vocabulary
    token: torch.Tensor  # [rows] int64: draft id of the target's best token, -1 when outside
    weight: torch.Tensor  # [rows] float32: how much the trainer wants a position to count


class Objective(Protocol):
    """A loss over the unrolled steps of one request."""

    name: str
    acceptance_rule: str  # the rule of serving that it optimises for
    needs_mass: bool  # whether ``Step.mass`` must be computed (a pass of the whole lm_head)

    def __call__(self, steps: Sequence[Step]) -> torch.Tensor:  # scalar, to be made small
        ...


def decayed_mean(
    losses: Sequence[torch.Tensor],  # one [rows] a step
    weights: Sequence[torch.Tensor],  # one [rows] a step
    decay: float,
) -> torch.Tensor:
    """Sum over steps k of ``decay ** k`` times the weighted mean over positions.

    Positions of weight zero stay in the mean's count, as in EAGLE3's training, so that a request
    with few useful positions pulls less.
    """
    total = losses[0].new_zeros(())
    for k, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
        if len(loss):
            total = total + decay**k * (loss * weight).mean()
    return total
