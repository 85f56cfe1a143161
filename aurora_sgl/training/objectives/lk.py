"""LK: make the acceptance probability itself large, blended with KL while it is small.

Under rejection sampling a draft is accepted with probability ``a = sum_v min(p(v), q(v))``, with p
over the whole vocabulary, so mass outside the draft vocabulary is lost. The loss of a position is
``w * KL + (1 - w) * -log a`` with ``w = exp(-eta * a)`` held constant: far from the target, where
the minimum has little gradient, KL leads; near it, acceptance does.
Source: LK losses, arXiv 2602.23881.
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

_SMALLEST = 1e-8


class LK:
    name = "lk"
    needs_mass = True
    needs_proposals = False
    reference_from = NEVER
    reach = 0

    def __init__(self, *, step_decay: float = 0.8, eta: float = 3.0) -> None:
        self.step_decay = step_decay
        self.eta = eta

    @classmethod
    def from_settings(cls, settings: ObjectiveSettings) -> Self:
        return cls(step_decay=settings.step_decay, eta=settings.lk_eta)

    def __call__(self, steps: Sequence[UnrolledStep], context: LossContext = LossContext()) -> Loss:  # noqa: B008
        losses = [self._position_losses(step) for step in steps]
        weights = [step.weight * (step.token >= 0) for step in steps]
        return Loss(decayed_mean(losses, weights, self.step_decay))

    def _position_losses(self, step: UnrolledStep) -> torch.Tensor:  # [rows]
        assert step.mass is not None
        inside = step.log_p.exp()
        kl = (inside * (step.log_p.clamp(min=-1e4) - step.log_q)).sum(-1)
        accepted = torch.minimum(inside * step.mass[:, None], step.log_q.exp()).sum(-1)
        share = torch.exp(-self.eta * accepted.detach())
        return share * kl - (1 - share) * accepted.clamp(min=_SMALLEST).log()
