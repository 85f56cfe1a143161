"""Distil first, then reinforce: a drafter that knows the target's distribution, then what pays.

While ``1 - rl_share`` of the run lasts the loss is forward KL. Afterwards it is the policy
gradient on top, with forward KL kept at ``kl_weight`` as the anchor that a pure policy gradient
lacks (DVI, arXiv 2510.05421, warms up by KL in the same way).
"""

from __future__ import annotations

from collections.abc import Sequence

from aurora_sgl.training.objectives.base import Loss, Moment, Step
from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.policy_gradient import PolicyGradient


class DistilThenRL:
    name = "distil_then_rl"
    acceptance_rule = "target_greedy"
    needs_mass = False
    needs_reference = True

    def __init__(
        self,
        *,
        step_decay: float = 0.8,
        rl_share: float = 0.3,
        kl_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.distil = ForwardKL(step_decay=step_decay)
        self.reinforce = PolicyGradient(step_decay=step_decay, seed=seed)
        self.rl_share, self.kl_weight = rl_share, kl_weight

    def __call__(self, steps: Sequence[Step], at: Moment = Moment()) -> Loss:  # noqa: B008
        if at.done < 1 - self.rl_share:
            return self.distil(steps, at)
        rewarded = self.reinforce(steps, at)
        value = rewarded.value + self.kl_weight * self.distil.value(steps)
        return Loss(value, rewarded.statistics)
