"""Make the expected number of accepted drafts large, the quantity that serving is paid in.

Let x_1, x_2, ... be what the target says from a base row and a_i the probability that draft i is
x_i. A chain has ``sum_k prod_{i <= k} a_i`` drafts accepted in expectation; this is maximised
directly, without sampling, blended with forward KL, whose gradient does not fade where the
product is near 0: ``KL - reward_weight * expected accepted drafts``.

Chain (top-k 1): ``a_i = q_i(x_i)``, what a chain sampled from the drafter would reach. SGLang's
chain takes the most likely token instead; q(x) is its smooth stand-in.
Tree (top-k above 1): x_i is explored when it is among the ``topk`` most likely tokens of its row,
so ``a_i = sigmoid((log q(x_i) - log q(c)) / temperature)`` with c the strongest token that
would have to be beaten: the topk-th best of the others. This knows which branches are explored,
which a distilling loss does not, and stands in for a step function; that a tree keeps only its
best ``nodes`` over all depths is left out of it.

A path counts on only while the log goes on with the target's best token: always in a greedy
answer, in a prompt or a sampled answer only as far as it happens to.
Source: the closed form for chains is that of expected accepted length in arXiv 2605.14978 and of
GTO's reward (arXiv 2509.22134) under a greedy target; the soft inclusion is ours.
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
    on_path,
)
from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.settings import ObjectiveSettings


class ExpectedAcceptLength:
    name = "expected_accept_length"
    needs_mass = False
    needs_proposals = False
    reference_from = NEVER
    reach = 0

    def __init__(
        self,
        *,
        step_decay: float = 0.8,
        topk: int = 1,
        reward_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        self.distil = ForwardKL(step_decay=step_decay)
        self.topk, self.reward_weight, self.temperature = topk, reward_weight, temperature

    @classmethod
    def from_settings(cls, settings: ObjectiveSettings) -> Self:
        return cls(
            step_decay=settings.step_decay,
            topk=settings.topk,
            reward_weight=settings.reward_weight,
            temperature=settings.inclusion_temperature,
        )

    def __call__(self, steps: Sequence[UnrolledStep], context: LossContext = LossContext()) -> Loss:  # noqa: B008
        accepted = self.expected(steps)
        weight = steps[0].weight * (steps[0].token >= 0)
        value = self.distil.value(steps) - self.reward_weight * (accepted * weight).mean()
        reward = accepted.detach()
        spread = reward.std(unbiased=False)
        return Loss(value, {"reward_mean": reward.mean(), "reward_std": spread})

    def expected(self, steps: Sequence[UnrolledStep]) -> torch.Tensor:  # [rows of step 0]
        """Expected accepted drafts from each base row, at most one a step."""
        reached = torch.ones_like(steps[0].weight)
        total = torch.zeros_like(reached)
        base = torch.arange(len(total), device=total.device)
        for k, step in enumerate(steps):
            if k:
                base, reached = step.from_before(base), step.from_before(reached)
            reached = reached * self._accepted(step)
            total = total.index_add(0, base, reached)
            reached = reached * on_path(step)
        return total

    def _accepted(self, step: UnrolledStep) -> torch.Tensor:  # [rows]
        inside = step.token >= 0
        own = step.log_q.gather(-1, step.token.clamp(min=0)[:, None]).squeeze(-1)
        if self.topk == 1:
            chance = own.exp()
        else:
            others = step.log_q.scatter(-1, step.token.clamp(min=0)[:, None], float("-inf"))
            beaten = others.topk(min(self.topk, others.shape[-1] - 1), dim=-1).values[:, -1]
            chance = torch.sigmoid((own - beaten) / self.temperature)
        return chance * inside
