"""Objectives that maximise what is accepted, against plain twins; and what the log proposed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from aurora_sgl.sequences.sequence import LoggedProposal, Sequence
from aurora_sgl.training.objectives.base import LoggedTokens, LossContext, UnrolledStep
from aurora_sgl.training.objectives.distil_then_rl import DistilThenRL
from aurora_sgl.training.objectives.expected_accept_length import ExpectedAcceptLength
from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.policy_gradient import PolicyGradient, logged_advantage
from aurora_sgl.training.proposals import logged_tokens

VOCAB = 5


def leaves(rows: tuple[int, ...] = (4, 3, 2)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(count, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
        for count in rows
    ]


def steps_of(logits: list[torch.Tensor], **more: object) -> list[UnrolledStep]:
    generator = torch.Generator().manual_seed(9)
    steps = []
    for one in logits:
        count = len(one)
        token = torch.randint(0, VOCAB, (count,), generator=generator)
        token[0] = -1 if len(steps) == 1 else token[0]
        steps.append(
            UnrolledStep(
                log_q=one.log_softmax(-1),
                log_p=torch.randn(count, VOCAB, generator=generator).double().log_softmax(-1),
                mass=None,
                token=token,
                weight=torch.rand(count, generator=generator).double(),
                follows=torch.rand(count, generator=generator) < 0.8,
                **more,  # type: ignore[arg-type]
            )
        )
    return steps


def plain_expected(
    logits: list[torch.Tensor], steps: list[UnrolledStep], topk: int
) -> list[torch.Tensor]:
    """Row by row, in scalars: sum over depths of the product of what is accepted on the way."""
    found = []
    for row in range(len(logits[0])):
        total, reached = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for one, step in zip(logits, steps, strict=True):
            if row >= len(one) or int(step.token[row]) < 0:
                break
            token = int(step.token[row])
            scores = one[row]
            if topk == 1:
                chance = scores[token].exp() / scores.exp().sum()
            else:
                others = sorted((float(s.detach()), i) for i, s in enumerate(scores) if i != token)
                rival = others[-topk][1]
                chance = 1 / (1 + torch.exp(scores[rival] - scores[token]))
            reached = reached * chance
            total = total + reached
            assert step.follows is not None
            if not bool(step.follows[row]):
                break
        found.append(total)
    return found


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_expected_accept_length_and_its_gradient_equal_their_plain_twin(topk: int) -> None:
    logits, again = leaves(), leaves()
    steps = steps_of(logits)
    objective = ExpectedAcceptLength(topk=topk, reward_weight=2.0)
    loss = objective(steps)
    rows = plain_expected(again, steps, topk)
    weight = steps[0].weight * (steps[0].token >= 0)
    distil = ForwardKL().value(steps_of(again))
    twin = distil - 2.0 * sum(w * r for w, r in zip(weight, rows, strict=True)) / len(rows)
    torch.testing.assert_close(loss.value, twin)
    assert loss.statistics["reward_mean"] == pytest.approx(
        sum(row.item() for row in rows) / len(rows)
    )
    loss.value.backward()  # type: ignore[no-untyped-call]
    twin.backward()  # type: ignore[union-attr]
    for one, other in zip(logits, again, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_sampled_policy_gradient_is_the_gradient_of_the_exact_expected_reward() -> None:
    """Without standardising, its mean is that of the closed form (many groups, one row)."""
    logits = leaves((1, 1))
    steps = steps_of(logits)
    steps = [
        UnrolledStep(s.log_q, s.log_p, None, torch.tensor([k]), torch.ones(1).double())
        for k, s in enumerate(steps)
    ]
    exact = sum(plain_expected(logits, [_following(s) for s in steps], 1))
    exact_gradient = torch.autograd.grad(exact, logits, retain_graph=True)  # type: ignore[arg-type]
    objective = PolicyGradient(group=60_000, beta=0.0, clip=10.0, reuse=1)
    rollouts = objective._sample(steps, 0)
    spread = rollouts.reward.std(0, unbiased=False)
    objective.kept[0] = rollouts
    loss = objective(steps, LossContext(key=0))
    sampled = torch.autograd.grad(loss.value, logits)
    for mine, true in zip(sampled, exact_gradient, strict=True):
        torch.testing.assert_close(-mine * spread, true, atol=0.01, rtol=0.05)
    assert float(rollouts.reward.mean()) == pytest.approx(float(exact), abs=0.02)  # type: ignore[arg-type]


def _following(step: UnrolledStep) -> UnrolledStep:
    return UnrolledStep(step.log_q, step.log_p, None, step.token, step.weight, torch.tensor([True]))


def test_a_draft_earns_nothing_behind_its_first_rejection_and_deeper_drafts_earn_less() -> None:
    logits = leaves((3, 3, 3))
    steps = steps_of(logits)
    objective = PolicyGradient(group=64, depth_cost=0.1)
    made = objective._sample(steps, 0)
    for member, row in itertools.product(range(64), range(3)):
        earned = 0.0
        for k, step in enumerate(steps):
            if int(made.tokens[k][member, row]) != int(step.token[row]):
                break
            earned += 1 - 0.1 * k
            assert step.follows is not None
            if not bool(step.follows[row]):
                break
        assert float(made.reward[member, row]) == pytest.approx(earned)


def test_a_group_is_used_again_with_a_clipped_ratio_and_then_sampled_anew() -> None:
    logits = leaves()
    objective = PolicyGradient(group=32, reuse=2, beta=0.0, clip=0.1)
    first = objective(steps_of(logits), LossContext(key=3))
    assert first.statistics["clip_fraction"] == 0 and 3 in objective.kept
    moved = [(one + 2 * torch.randn_like(one)).detach().requires_grad_() for one in logits]
    second = objective(steps_of(moved), LossContext(key=3))
    assert 0 < second.statistics["clip_fraction"] < 1 and 3 not in objective.kept
    assert second.statistics["reward_mean"] == first.statistics["reward_mean"]


def test_the_clipped_loss_equals_a_plain_loop_over_the_drafts() -> None:
    logits = leaves()
    steps = steps_of(logits)
    objective = PolicyGradient(group=16, reuse=2, beta=0.0, clip=0.15)
    made = objective._sample(steps, 0)
    moved = [(one + 0.5).detach() * 1.2 for one in logits]
    after = steps_of(moved)
    value, _ = objective._rollout_loss(after, made)
    total = 0.0
    for k, step in enumerate(after):
        for row in range(len(step.token)):
            for member in range(16):
                if not bool(made.alive[k][member, row]):
                    continue
                rewards = made.reward[:, row]
                gain = float(
                    (rewards[member] - rewards.mean()) / (rewards.std(unbiased=False) + 1e-6)
                )
                token = int(made.tokens[k][member, row])
                ratio = math.exp(float(step.log_q[row, token] - made.log_prob[k][member, row]))
                held = min(max(ratio, 0.85), 1.15)
                worth = float(step.weight[row]) * min(ratio * gain, held * gain)
                total -= worth / 16 / len(step.token)
    assert float(value) == pytest.approx(total, rel=1e-5)


def test_rejected_proposals_are_pushed_down_and_accepted_ones_up() -> None:
    logits = torch.zeros(2, VOCAB, dtype=torch.float64, requires_grad=True)
    logged = LoggedTokens(
        row=torch.tensor([0, 0, 1]),
        token=torch.tensor([2, 3, 4]),
        reward=torch.tensor([2.0, 0.0, 0.0]),
        group=torch.tensor([5, 5, 9]),
    )
    step = UnrolledStep(
        logits.log_softmax(-1),
        torch.full((2, VOCAB), -math.log(VOCAB)).double(),
        None,
        torch.tensor([2, 1]),
        torch.ones(2).double(),
        logged=logged,
    )
    assert logged_advantage(step, logged).tolist() == pytest.approx([1.0, -1.0, -1 / VOCAB])
    loss = PolicyGradient()._logged_loss([step])
    assert float(loss) == pytest.approx(-(1 - 1 - 1 / VOCAB) / VOCAB / 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    pulled = -logits.grad
    assert pulled[0, 2] > 0 > pulled[0, 3] and pulled[1, 4] < 0


def test_the_reference_holds_the_drafter_and_its_distance_is_logged() -> None:
    logits = leaves()
    plain = steps_of(logits)
    held = [
        UnrolledStep(s.log_q, s.log_p, None, s.token, s.weight, s.follows, s.log_q.detach())
        for s in plain
    ]
    same = PolicyGradient(beta=1.0)(held)
    assert same.statistics["kl_to_reference"] == pytest.approx(0, abs=1e-9)
    away = [
        UnrolledStep(s.log_q, s.log_p, None, s.token, s.weight, s.follows, s.log_p) for s in plain
    ]
    apart = [(s.log_q.exp() * (s.log_q - s.log_p)).sum(-1) for s in plain]
    expected = sum(
        0.8**k * float((far * s.weight).mean().detach())
        for k, (far, s) in enumerate(zip(apart, plain, strict=True))
    )
    held_back, free = PolicyGradient(beta=1.0)(away), PolicyGradient(beta=0.0)(away)
    assert float((held_back.value - free.value).detach()) == pytest.approx(expected)
    assert held_back.statistics["kl_to_reference"] == pytest.approx(float(apart[0].mean().detach()))


def test_distilling_comes_first_and_reinforcement_after_its_share_of_the_run() -> None:
    steps = steps_of(leaves())
    objective = DistilThenRL(ForwardKL(), PolicyGradient(), rl_share=0.25)
    assert torch.equal(objective(steps, LossContext(0.7)).value, ForwardKL().value(steps))
    assert "reward_mean" in objective(steps, LossContext(0.8)).statistics


def test_logged_drafts_give_siblings_along_the_accepted_path_and_nothing_below_a_rejection() -> (
    None
):
    tokens = torch.tensor([9, 8, 7, 1, 2, 3, 4])
    # A tree from position 3: node 1 (token 2) and node 2 (token 5) below the root, nodes 3 and 4
    # (tokens 6 and 0) below node 1, node 5 below the rejected node 2.
    tree = LoggedProposal(3, [2, 5, 6, 0, 3], [0, 0, 1, 1, 2], accepted=1)
    sequence = Sequence(
        1, tokens, torch.zeros(6, 3), torch.zeros(6, 2), output_start=2, proposals=(tree,)
    )
    draft_of = torch.arange(10)
    draft_of[5] = -1  # token 5 has left the draft vocabulary
    found = logged_tokens(sequence, 1, draft_of)
    assert [(p.row, p.token, p.reward) for p in found[0]] == [(1, 2, 1.0)]
    assert [(p.row, p.token, p.reward) for p in found[1]] == [(1, 6, 0.0), (1, 0, 0.0)]
    assert set(found) == {0, 1}
