"""Reinforcement learning: the drafter is the policy, a verify step the episode, accepted drafts
the reward.

*Roll-outs.* From every base row a group of drafts is sampled from the drafter. Up to its first
rejection a draft follows the target's path, so the drafter's distributions along it are those of
the unrolled steps and no further forward is needed; what comes after it changes nothing. The
reward is the number of accepted drafts, known exactly from the log of a greedy answer, each worth
``1 - depth_cost * depth`` (a deeper draft costs a forward more). The advantage is standardised
within the group of one row (GRPO, arXiv 2402.03300; GTO, arXiv 2509.22134). A group is used for
``reuse`` visits of its request; the importance ratio to the drafter that sampled it is clipped as
in PPO (arXiv 1707.06347): ``-min(r A, clip(r, 1 - clip, 1 + clip) A)``.

*Proposals of the log.* A server's proposals are deterministic (argmax and top-k), so they have no
importance ratio: their expected reward is made large directly, ``-A q(token)``. Siblings of one
draft form a group, with the mean reward of the group as baseline; a proposal without siblings has
the drafter's own probability of being accepted there. Rejected ones enter with their negative
advantage.

*Reference.* ``beta`` times the exact KL(q || reference) holds the drafter near the version that it
started from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from aurora_sgl.training.objectives.base import (
    LoggedTokens,
    Loss,
    LossContext,
    UnrolledStep,
    entropy,
    kl_to_reference,
    log_prob_of,
    on_path,
    reference_loss,
)
from aurora_sgl.training.objectives.settings import ObjectiveSettings

_SMALL = 1e-6


@dataclass
class _Rollouts:
    """One group a base row. ``tokens[k]``, ``log_prob[k]``, ``alive[k]``: [group, rows of k]."""

    tokens: list[torch.Tensor]  # sampled draft ids
    log_prob: list[torch.Tensor]  # under the drafter that sampled them
    alive: list[torch.Tensor]  # bool: all drafts before this one were accepted
    reward: torch.Tensor  # [group, rows of step 0]
    used: int = 0

    @property
    def advantage(self) -> torch.Tensor:  # [group, rows of step 0]
        centred = self.reward - self.reward.mean(0)
        return centred / (self.reward.std(0, unbiased=False) + _SMALL)


class PolicyGradient:
    name = "policy_gradient"
    needs_mass = False
    needs_proposals = True
    reference_from = 0.0
    reach = 0

    def __init__(
        self,
        *,
        step_decay: float = 0.8,
        group: int = 8,
        clip: float = 0.2,
        beta: float = 0.1,
        logged_weight: float = 1.0,
        depth_cost: float = 0.0,
        reuse: int = 2,
        seed: int = 0,
    ) -> None:
        assert group >= 2 and 0 <= depth_cost < 1 / 8, "every draft must be worth something"
        self.step_decay, self.group, self.clip, self.beta = step_decay, group, clip, beta
        self.logged_weight, self.depth_cost, self.reuse = logged_weight, depth_cost, reuse
        self.seed = seed
        self.kept: dict[int, _Rollouts] = {}
        self.sampled: Counter[int] = Counter()  # how often a group was drawn for a key

    @classmethod
    def from_settings(cls, settings: ObjectiveSettings) -> Self:
        return cls(
            step_decay=settings.step_decay,
            group=settings.rl_group,
            clip=settings.rl_clip,
            beta=settings.rl_beta,
            logged_weight=settings.rl_logged_weight,
            depth_cost=settings.rl_depth_cost,
            reuse=settings.rl_reuse,
            seed=settings.seed,
        )

    def __call__(self, steps: Sequence[UnrolledStep], context: LossContext = LossContext()) -> Loss:  # noqa: B008
        rollouts = self.kept.pop(context.key, None) or self._sample(steps, context.key)
        rollouts.used += 1
        if rollouts.used < self.reuse:
            self.kept[context.key] = rollouts
        reward, clipped = self._rollout_loss(steps, rollouts)
        value = reward + self.logged_weight * self._logged_loss(steps)
        statistics = {
            "reward_mean": rollouts.reward.mean(),
            "reward_std": rollouts.reward.std(),
            "clip_fraction": clipped,
            "entropy": entropy(steps[0]),
        }
        if steps[0].log_r is not None:
            statistics["kl_to_reference"] = kl_to_reference(steps[0]).detach().mean()
            value = value + self.beta * reference_loss(steps, self.step_decay)
        return Loss(value, statistics)

    def _sample(self, steps: Sequence[UnrolledStep], key: int) -> _Rollouts:
        """Drafts from the drafter as it is now. Their randomness depends on the request and on how
        often it was visited, not on which process visits it."""
        device = steps[0].log_q.device
        place = (self.seed * 1_000_003 + key) * 1_000_003 + self.sampled[key]
        generator = torch.Generator(device).manual_seed(place % (1 << 63))
        self.sampled[key] += 1
        rows = len(steps[0].token)
        alive = torch.ones(self.group, rows, dtype=torch.bool, device=device)
        rollouts = _Rollouts([], [], [], torch.zeros(self.group, rows, device=device))
        for k, step in enumerate(steps):
            count = len(step.token)
            alive = alive[:, :count]
            chance = step.log_q.detach().exp()
            token = torch.multinomial(chance, self.group, True, generator=generator).T
            accepted = alive & (token == step.token)
            rollouts.tokens.append(token)
            rollouts.log_prob.append(log_prob_of(step, token).detach())
            rollouts.alive.append(alive)
            rollouts.reward[:, :count] += accepted * (1 - self.depth_cost * k)
            alive = accepted & on_path(step)
        return rollouts

    def _rollout_loss(
        self, steps: Sequence[UnrolledStep], rollouts: _Rollouts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        advantage = rollouts.advantage
        total = steps[0].log_q.new_zeros(())
        clipped = drawn = torch.zeros((), dtype=torch.int64, device=total.device)
        for k, step in enumerate(steps):
            count = len(step.token)
            alive, gain = rollouts.alive[k], advantage[:, :count]
            ratio = (log_prob_of(step, rollouts.tokens[k]) - rollouts.log_prob[k]).exp()
            held = ratio.clamp(1 - self.clip, 1 + self.clip)
            surrogate = torch.minimum(ratio * gain, held * gain) * alive
            if count:
                total = total - (surrogate.mean(0) * step.weight).mean()
            clipped = clipped + ((held * gain < ratio * gain) & alive).sum()
            drawn = drawn + alive.sum()
        return total, clipped / drawn.clamp(min=1)

    def _logged_loss(self, steps: Sequence[UnrolledStep]) -> torch.Tensor:
        total = steps[0].log_q.new_zeros(())
        for step in steps:
            if step.logged is None or not len(step.logged.row):
                continue
            chance = step.log_q[step.logged.row, step.logged.token].exp()
            gain = logged_advantage(step, step.logged) * step.weight[step.logged.row]
            total = total - (gain * chance).sum() / len(step.token)
        return total


def logged_advantage(step: UnrolledStep, logged: LoggedTokens) -> torch.Tensor:  # [m]
    """Reward less the mean of its siblings, or for an only child less the drafter's own chance."""
    _, group, size = torch.unique(logged.group, return_inverse=True, return_counts=True)
    mean = torch.zeros_like(size, dtype=torch.float32).index_add_(0, group, logged.reward) / size
    own = log_prob_of(step, step.token).detach().exp()[logged.row]
    return logged.reward - torch.where(size[group] > 1, mean[group], own)
