"""Distil first, then reinforce: a drafter that knows the target's distribution, then what pays.

While ``1 - rl_share`` of the run lasts the loss is forward KL. Afterwards it is the policy
gradient on top, with forward KL kept at ``kl_weight`` as the anchor that a pure policy gradient
lacks (DVI, arXiv 2510.05421, warms up by KL in the same way).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from aurora_sgl.training.objectives.base import Loss, LossContext, UnrolledStep
from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.policy_gradient import PolicyGradient
from aurora_sgl.training.objectives.settings import ObjectiveSettings


class DistilThenRL:
    name = "distil_then_rl"
    needs_mass = False
    needs_proposals = True
    reach = 0

    def __init__(
        self,
        distil: ForwardKL,
        reinforce: PolicyGradient,
        *,
        rl_share: float = 0.3,
        kl_weight: float = 1.0,
    ) -> None:
        self.distil, self.reinforce = distil, reinforce
        self.reference_from, self.kl_weight = 1 - rl_share, kl_weight

    @classmethod
    def from_settings(cls, settings: ObjectiveSettings) -> Self:
        return cls(
            ForwardKL.from_settings(settings),
            PolicyGradient.from_settings(settings),
            rl_share=settings.rl_share,
            kl_weight=settings.rl_kl_weight,
        )

    def __call__(self, steps: Sequence[UnrolledStep], context: LossContext = LossContext()) -> Loss:  # noqa: B008
        if context.progress < self.reference_from:
            return self.distil(steps, context)
        rewarded = self.reinforce(steps, context)
        value = rewarded.value + self.kl_weight * self.distil.value(steps)
        return Loss(value, rewarded.statistics)
