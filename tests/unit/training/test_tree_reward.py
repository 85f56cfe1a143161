"""The reward of the tree as it is served, against enumeration, and KL where a draft can get to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from aurora_sgl.training.loss import BatchLoss
from aurora_sgl.training.objectives import OBJECTIVES
from aurora_sgl.training.objectives.base import (
    Loss,
    LossContext,
    UnrolledStep,
    decayed_mean,
    within_top,
)
from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.reach_kl import ReachKL
from aurora_sgl.training.objectives.tree_reward import TreeReward
from aurora_sgl.training.settings import TrainSettings
from tests.unit.training.test_packed import case, gradient

VOCAB, TOPK = 5, 2


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inclusion(scores: torch.Tensor, token: int) -> torch.Tensor:
    """By the definition: against the topk-th best of the others."""
    others = torch.cat((scores[:token], scores[token + 1 :]))
    rival = others.sort(descending=True).values[TOPK - 1]
    return 1 / (1 + torch.exp(rival - scores[token]))


def step_of(
    logits: torch.Tensor, log_p: torch.Tensor, token: torch.Tensor, **more: torch.Tensor
) -> UnrolledStep:
    weight = torch.ones(len(token), dtype=torch.float64)
    return UnrolledStep(logits.log_softmax(-1), log_p, None, token, weight, **more)


def test_the_greedy_reward_and_its_gradient_are_those_of_all_trees_enumerated() -> None:
    """Each token of the path is in the tree or not: the accepted drafts of all eight trees."""
    logits = [random(1, VOCAB, seed=k).requires_grad_() for k in range(3)]
    path = (1, 3, 0)
    steps = [
        step_of(one, one.detach().log_softmax(-1), torch.tensor([token]))
        for one, token in zip(logits, path, strict=True)
    ]
    expected = torch.zeros((), dtype=torch.float64)
    for included in itertools.product((True, False), repeat=3):
        accepted = [*included, False].index(False)
        chance = torch.ones((), dtype=torch.float64)
        for one, token, is_in in zip(logits, path, included, strict=True):
            a = inclusion(one[0], token)
            chance = chance * (a if is_in else 1 - a)
        expected = expected + chance * accepted
    reward = TreeReward(ReachKL(), topk=TOPK).expected(steps)
    torch.testing.assert_close(reward[0], expected)
    for mine, twin in zip(
        torch.autograd.grad(reward.sum(), logits, retain_graph=True),
        torch.autograd.grad(expected, logits),
        strict=True,
    ):
        torch.testing.assert_close(mine, twin)


def test_the_sampled_reward_is_the_target_mass_that_all_nodes_of_the_tree_cover() -> None:
    """Over every log that the target can draw, weighed by its law."""
    root = random(1, VOCAB, seed=1).requires_grad_()
    below = random(VOCAB, VOCAB, seed=2).requires_grad_()  # of each first token
    p_root = random(1, VOCAB, seed=3).log_softmax(-1)
    p_below = random(VOCAB, VOCAB, seed=4).log_softmax(-1)
    objective, mean = TreeReward(ReachKL(), topk=TOPK), torch.zeros((), dtype=torch.float64)
    yes = torch.tensor([True])
    for first in range(VOCAB):
        steps = [
            step_of(scores, log_p, log_p.argmax(-1), after=torch.tensor([token]),
                    follows=~yes, sampled=yes)
            for scores, log_p, token in (
                (root, p_root, first), (below[first : first + 1], p_below[first : first + 1], 0)
            )
        ]  # fmt: skip
        mean = mean + p_root[0, first].exp() * objective.expected(steps)[0]
    covered = torch.zeros((), dtype=torch.float64)
    for first in range(VOCAB):
        node = p_root[0, first].exp() * inclusion(root[0], first)
        covered = covered + node
        for second in range(VOCAB):
            covered = covered + node * p_below[first, second].exp() * inclusion(
                below[first], second
            )
    torch.testing.assert_close(mean, covered)
    for mine, twin in zip(
        torch.autograd.grad(mean, (root, below), retain_graph=True),
        torch.autograd.grad(covered, (root, below)),
        strict=True,
    ):
        torch.testing.assert_close(mine, twin)


def test_a_row_that_is_not_computed_gains_nothing_below() -> None:
    logits = [random(3, VOCAB, seed=7), random(2, VOCAB, seed=8)]
    token = torch.tensor([1, 2, 3])
    steps = [
        step_of(logits[0], logits[0], token),
        step_of(logits[1], logits[1], token[:2], parent=torch.tensor([0, 2])),
    ]
    reward = TreeReward(ReachKL(), topk=TOPK).expected(steps)
    first = [inclusion(logits[0][row], int(token[row])) for row in range(3)]
    second = [inclusion(logits[1][row], int(token[row])) for row in range(2)]
    wanted = [first[0] * (1 + second[0]), first[1], first[2] * (1 + second[1])]
    torch.testing.assert_close(reward, torch.stack(wanted))


class MaskedKL(ForwardKL):
    """KL where the path so far lies in the drafter's top 3, over rows that are all computed."""

    name = "masked"

    def __call__(self, steps: Sequence[UnrolledStep], context: LossContext = LossContext()) -> Loss:  # noqa: B008
        reached, losses, weights = torch.ones_like(steps[0].weight), [], []
        for k, step in enumerate(steps):
            reached = step.from_before(reached) if k else reached
            losses.append(-(step.log_p.exp() * step.log_q).sum(-1))
            weights.append(step.weight * reached * (step.token >= 0))
            reached = reached * within_top(step.log_q, step.next_token, 3)
        return Loss(decayed_mean(losses, weights, 1.0))


def test_reached_rows_alone_have_the_gradient_of_all_rows_under_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, MaskedKL.name, MaskedKL)
    drafter, head, data = case(tmp_path / "t")
    batch = list(enumerate(data))
    masked = gradient(drafter, head, batch, objective="masked")
    reached = gradient(drafter, head, batch, objective="reach_kl", reach_topk=3)
    every = gradient(drafter, head, batch, objective="reach_kl", reach_topk=24)
    assert masked[0] == pytest.approx(reached[0], rel=1e-12) and every[0] > reached[0]
    for a, b in zip(masked[3], reached[3], strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_is_frozen_when_reinforcement_begins(tmp_path: Path) -> None:
    drafter, head, data = case(tmp_path / "t")
    settings = TrainSettings(objective="tree_reward", autocast=False, rl_share=0.5)
    losses = BatchLoss(drafter, head, settings)
    (early,) = losses.packs(list(enumerate(data)), done=0.4)
    assert losses.reference is None and not early.statistics
    (first,) = losses.packs(list(enumerate(data)), done=0.6)
    assert float(first.statistics["kl_to_reference"]) == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(1.1)
    (later,) = losses.packs(list(enumerate(data)), done=0.7)
    assert float(later.statistics["kl_to_reference"]) > 0.01
    assert {"reward_mean", "reward_std", "entropy"} < set(later.statistics)
