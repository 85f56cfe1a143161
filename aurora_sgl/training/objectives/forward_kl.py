"""Forward KL from the target to the drafter: the recipe of EAGLE3's training and of Aurora.

With p the target renormalised to the draft vocabulary and q the drafter, the loss of a position is
``-sum_v p(v) log q(v)`` (KL up to p's entropy, which has no gradient). Its gradient in
q's logits is ``q - p``. Positions where the target's best token lies outside the draft vocabulary
are masked.
Source: EAGLE-3 (arXiv 2503.01840) and Aurora (arXiv 2602.06932): steps weighted 0.8 ** k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from aurora_sgl.training.objectives.base import (
    NEVER,
    Loss,
    LossContext,
    UnrolledStep,
    decayed_mean,
)
from aurora_sgl.training.objectives.settings import ObjectiveSettings


class ForwardKL:
    name = "forward_kl"
    needs_mass = False
    needs_proposals = False
    reference_from = NEVER
    reach = 0

    def __init__(self, *, step_decay: float = 0.8) -> None:
        self.step_decay = step_decay

    @classmethod
    def from_settings(cls, settings: ObjectiveSettings) -> Self:
        return cls(step_decay=settings.step_decay)

    def __call__(self, steps: Sequence[UnrolledStep], context: LossContext = LossContext()) -> Loss:  # noqa: B008
        return Loss(self.value(steps))

    def value(self, steps: Sequence[UnrolledStep]) -> torch.Tensor:  # scalar
        """The loss alone, for objectives that blend it with another."""
        losses = [-(step.log_p.exp() * step.log_q).sum(-1) for step in steps]
        weights = [step.weight * (step.token >= 0) for step in steps]
        return decayed_mean(losses, weights, self.step_decay)
