"""Forward KL where the served draft can get to: distillation on the policy's own states.

The gradient of a policy's expected reward weighs a state by the probability that the policy reaches
it. A draft reaches step k on the log's path exactly when each token of that path so far is among
the ``topk`` most likely of its row: a tree explores those and no others. So step k's forward KL
counts only there, without a further decay, and rows that no draft reaches are not computed at all.
For a greedy request the log's path is the target's; for one that was sampled it is a draw from the
target, so that the mean over logs weighs a path by the target's probability. The weight is held
constant: it has no gradient.

With r_k = prod_{i < k} [x_i in top-k of q_i], x the log:

    loss = sum_k decay ** k * mean over rows of r_k * KL(p_k || q_k)

Source: the state distribution is that of the policy gradient theorem (Sutton et al. 1999), full
information in place of a sampled action that of on-policy distillation (arXiv 2306.13649), with the
served tree's own states in place of the drafter's samples.
"""

from __future__ import annotations

from typing import Self

from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.settings import ObjectiveSettings


class ReachKL(ForwardKL):
    name = "reach_kl"

    def __init__(self, *, step_decay: float = 1.0, reach: int = 4) -> None:
        super().__init__(step_decay=step_decay)
        self.reach = reach

    @classmethod
    def from_settings(cls, settings: ObjectiveSettings) -> Self:
        return cls(step_decay=settings.reach_decay, reach=settings.reach_topk)
