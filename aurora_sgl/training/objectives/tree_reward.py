"""Reinforce the tree as it is served, by the exact gradient of its expected accept length.

From a base row the target says x_0, x_1, ... A token v is a child in the tree when it is among the
``topk`` most likely of its row; its soft inclusion is

    a(v) = sigmoid((log q(v) - log q(c)) / temperature)

with c the strongest token that it would have to beat, the topk-th best of the others. The expected
number of accepted drafts from step k on is then

    R_k = m_k + a(x_k) R_{k+1}      greedy: m_k = a(x_k), one draft more when x_k is included
                                    sampled: m_k = sum_v p(v) a(v), the target mass that is covered

and R_0 is maximised: every inclusion is multiplied by what is gained below it (reward to go), and
no draft is sampled, so the gradient has no variance beyond that of the log. A greedy path counts on
while the log goes on with the target's best token; a sampled log is a draw from p, so that the mean
over logs weighs each path by its probability. p is the target over the draft vocabulary. Rows that
lie outside of the ``reach`` most likely tokens are not computed and gain nothing below. That a tree
keeps only its best nodes over all depths is left out.

The reward stands beside :class:`ReachKL`, from ``1 - rl_share`` of the run on, and the drafter is
held near the one that it was when that began: with s = ``rl_kl_weight``, w = ``tree_reward_weight``
and b = ``rl_beta``, ``loss = s * reach KL - w * R_0 + b * KL(q || reference)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from aurora_sgl.training.objectives.base import (
    Loss,
    LossContext,
    UnrolledStep,
    entropy,
    kl_to_reference,
    reference_loss,
)
from aurora_sgl.training.objectives.reach_kl import ReachKL
from aurora_sgl.training.objectives.settings import ObjectiveSettings


class TreeReward:
    name = "tree_reward"
    needs_mass = False
    needs_proposals = False

    def __init__(
        self,
        distil: ReachKL,
        *,
        topk: int = 4,
        temperature: float = 1.0,
        reward_weight: float = 1.0,
        kl_weight: float = 1.0,
        beta: float = 0.0,
        rl_share: float = 1.0,
    ) -> None:
        self.distil, self.topk, self.temperature = distil, topk, temperature
        self.reward_weight, self.kl_weight, self.beta = reward_weight, kl_weight, beta
        self.reach, self.begins = distil.reach, 1 - rl_share
        self.reference_from = self.begins

    @classmethod
    def from_settings(cls, settings: ObjectiveSettings) -> Self:
        return cls(
            ReachKL.from_settings(settings),
            topk=settings.topk,
            temperature=settings.inclusion_temperature,
            reward_weight=settings.tree_reward_weight,
            kl_weight=settings.rl_kl_weight,
            beta=settings.rl_beta,
            rl_share=settings.rl_share,
        )

    def __call__(self, steps: Sequence[UnrolledStep], context: LossContext = LossContext()) -> Loss:  # noqa: B008
        distilled = self.distil.value(steps)
        if context.progress < self.begins:
            return Loss(distilled)
        reward = self.expected(steps)
        weight = steps[0].weight * (steps[0].token >= 0)
        value = self.kl_weight * distilled - self.reward_weight * (reward * weight).mean()
        statistics = {
            "reward_mean": reward.detach().mean(),
            "reward_std": reward.detach().std(unbiased=False),
            "entropy": entropy(steps[0]),
        }
        if steps[0].log_r is not None:
            statistics["kl_to_reference"] = kl_to_reference(steps[0]).detach().mean()
            value = value + self.beta * reference_loss(steps, self.distil.step_decay)
        return Loss(value, statistics)

    def expected(self, steps: Sequence[UnrolledStep]) -> torch.Tensor:  # [rows of step 0]
        """R_0 of each base row."""
        gains = [self._gains(step) for step in steps]
        below = torch.zeros_like(gains[-1][0])
        for k in range(len(steps) - 1, -1, -1):
            here, onward = gains[k]
            reward = here + onward * below
            if k:
                below = torch.zeros_like(gains[k - 1][0])
                rows = steps[k].parent
                rows = torch.arange(len(reward), device=reward.device) if rows is None else rows
                below = below.index_add(0, rows, reward)
        return reward

    def _gains(self, step: UnrolledStep) -> tuple[torch.Tensor, torch.Tensor]:  # [rows] twice
        """m, and the inclusion of the token with which the log goes on (0 where that ends)."""
        count = min(self.topk, step.log_q.shape[-1] - 1)
        best = step.log_q.topk(count + 1, dim=-1).values
        inside, outside = best[:, count], best[:, count - 1]  # rivals of who is in the top, or not

        def inclusion(log_q: torch.Tensor) -> torch.Tensor:  # [rows, n]
            is_in = log_q.detach() >= outside.detach()[:, None]
            rival = torch.where(is_in, inside[:, None], outside[:, None])
            return torch.sigmoid((log_q - rival) / self.temperature)

        def of(token: torch.Tensor) -> torch.Tensor:  # [rows]
            own = step.log_q.gather(-1, token.clamp(min=0)[:, None])
            return inclusion(own).squeeze(-1) * (token >= 0)

        here = of(step.token)
        onward = here if step.follows is None else here * step.follows
        if step.sampled is None:
            return here, onward
        covered = (step.log_p.exp() * inclusion(step.log_q)).sum(-1)
        onward = torch.where(step.sampled, of(step.next_token), onward)
        return torch.where(step.sampled, covered, here), onward
