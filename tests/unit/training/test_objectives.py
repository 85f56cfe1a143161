"""Objectives and the unrolled steps against plain twins."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aurora_sgl.drafter import scratch
from aurora_sgl.drafter.architectures.eagle import EAGLE
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.packed import PackedText
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.errors import AuroraError
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training import objectives
from aurora_sgl.training.objectives.base import UnrolledStep
from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.lk import LK
from aurora_sgl.training.objectives.settings import ObjectiveSettings
from aurora_sgl.training.target_rows import RequestPart, TargetRows
from tests.support.drafter_cases import HIDDEN, VOCAB, target_folder
from tests.support.drafter_twin import PlainDrafter


def steps_of(count: int, *, requires_grad: bool = False) -> list[UnrolledStep]:
    generator = torch.Generator().manual_seed(0)
    steps = []
    for k in range(count):
        rows = 6 - k
        logits = torch.randn(rows, 5, generator=generator, requires_grad=requires_grad)
        steps.append(
            UnrolledStep(
                log_q=logits.log_softmax(-1),
                log_p=torch.randn(rows, 5, generator=generator).log_softmax(-1),
                mass=torch.rand(rows, generator=generator),
                token=torch.randint(-1, 5, (rows,), generator=generator),
                weight=torch.rand(rows, generator=generator),
            )
        )
    return steps


def plain_kl(steps: list[UnrolledStep], decay: float) -> float:
    total = 0.0
    for k, step in enumerate(steps):
        summed = 0.0
        for i in range(len(step.token)):
            if step.token[i] >= 0:
                for p, q in zip(step.log_p[i].tolist(), step.log_q[i].tolist(), strict=True):
                    summed -= float(step.weight[i]) * math.exp(p) * q
        total += decay**k * summed / len(step.token)
    return total


def plain_lk(steps: list[UnrolledStep], decay: float, eta: float) -> float:
    total = 0.0
    for k, step in enumerate(steps):
        summed = 0.0
        for i in range(len(step.token)):
            if step.token[i] < 0:
                continue
            p, q = step.log_p[i].tolist(), step.log_q[i].tolist()
            mass = float(step.mass[i]) if step.mass is not None else 1.0
            accepted = sum(min(mass * math.exp(a), math.exp(b)) for a, b in zip(p, q, strict=True))
            kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            share = math.exp(-eta * accepted)
            loss = share * kl - (1 - share) * math.log(accepted)
            summed += float(step.weight[i]) * loss
        total += decay**k * summed / len(step.token)
    return total


def test_forward_kl_equals_its_plain_twin() -> None:
    steps = steps_of(3)
    value = ForwardKL(step_decay=0.7)(steps).value
    assert float(value) == pytest.approx(plain_kl(steps, 0.7), rel=1e-5)


def test_lk_equals_its_plain_twin() -> None:
    steps = steps_of(3)
    value = LK(step_decay=0.9)(steps).value
    assert float(value) == pytest.approx(plain_lk(steps, 0.9, 3.0), rel=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "lk"])
def test_a_drafter_that_equals_the_target_has_no_gradient(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 5, generator=generator, requires_grad=True)
    log_p = logits.detach().log_softmax(-1)
    step = UnrolledStep(
        logits.log_softmax(-1), log_p, torch.ones(4), torch.zeros(4).long(), torch.ones(4)
    )
    objectives.make(ObjectiveSettings(objective=name))([step]).value.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_positions_outside_the_draft_vocabulary_do_not_pull(name: str) -> None:
    logits = torch.zeros(2, 5, requires_grad=True)
    log_p = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    token = torch.tensor([-1, 2])
    step = UnrolledStep(logits.log_softmax(-1), log_p, torch.ones(2), token, torch.ones(2))
    objectives.make(ObjectiveSettings(objective=name))([step]).value.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert float(logits.grad[0].abs().max()) == 0 < float(logits.grad[1].abs().max())


def test_an_unknown_objective_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AuroraError, match="forward_kl, lk"):
        objectives.make(ObjectiveSettings(objective="magic"))


def case(folder: Path, architecture: str) -> tuple[Drafter, TargetHead, Sequence]:
    target = target_folder(folder, tied=False)
    head = TargetHead.load(target)
    drafter = scratch.make(target, draft_vocab_size=24, architecture=architecture, seed=2)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    torch.manual_seed(5)
    tokens = torch.randint(0, VOCAB, (12,))
    sequence = Sequence(
        1, tokens, torch.randn(11, drafter.config.feature_width), torch.randn(11, HIDDEN), 5
    )
    return drafter, head, sequence


@pytest.mark.parametrize("architecture", [EAGLE3, EAGLE])
def test_unrolled_steps_equal_a_served_chain_on_the_logged_tokens(
    tmp_path: Path, architecture: str
) -> None:
    drafter, head, sequence = case(tmp_path / "t", architecture)
    plain = PlainDrafter(drafter.config, drafter.state_dict(), head.embedding, head.lm_head)
    tokens = sequence.tokens.tolist()
    first = 3
    with torch.no_grad():
        text = PackedText.of([(sequence.tokens, sequence.features)], [(first, 11)])
        logits = [one.logits for one in drafter.unroll(text, head, steps=4)]
        assert [len(x) for x in logits] == [8, 7, 6, 5]
        text: list[tuple[torch.Tensor, torch.Tensor]] = []
        for base in range(11):
            probs, hidden, kv = plain.row(tokens[base + 1], sequence.features[base], base, text)
            text.append(kv)
            rows = list(text)
            for k in range(4):
                if base >= first and base - first < len(logits[k]):
                    got = logits[k][base - first].softmax(-1)
                    torch.testing.assert_close(got, probs, rtol=1e-3, atol=1e-5)
                if base + 2 + k >= len(tokens):
                    break
                probs, hidden, kv = plain.row(tokens[base + 2 + k], hidden, base + k + 1, rows)
                rows.append(kv)


def test_each_row_is_paired_with_the_target_at_the_position_that_it_predicts(
    tmp_path: Path,
) -> None:
    drafter, head, sequence = case(tmp_path / "t", EAGLE3)
    rows = TargetRows(drafter, head)
    best = rows.best_tokens(sequence)
    whole = sequence.last @ head.lm_head.T
    # From the first output token on the log itself is the target's choice (greedy).
    assert best[4:].tolist() == sequence.tokens[5:].tolist()
    assert best[:4].tolist() == whole[:4].argmax(-1).tolist()
    part = RequestPart(0, sequence, best, 2, 10, 2, 10)
    target = rows.of([part], torch.ones(8), steps=3, needs_mass=True)
    text = PackedText.of([(sequence.tokens[: len(best)], sequence.features)], [(2, 10)])
    drafted = drafter.unroll(text, head, steps=3)
    steps = [target.step(k, one, None) for k, one in enumerate(drafted)]
    assert [len(step.token) for step in steps] == [8, 7, 6]
    ids = drafter.target_ids
    for k, step in enumerate(steps):
        for j in range(len(step.token)):
            position = 2 + j + 1 + k
            p = whole[position].softmax(-1)[ids]
            assert step.mass is not None
            torch.testing.assert_close(step.mass[j], p.sum())
            torch.testing.assert_close(step.log_p[j].exp(), p / p.sum())
            token = int(step.token[j])
            assert (int(ids[token]) if token >= 0 else -1) in (int(best[position]), -1)


def test_sampled_and_constrained_requests_take_the_targets_best_token_and_not_the_logs(
    tmp_path: Path,
) -> None:
    drafter, head, sequence = case(tmp_path / "t", EAGLE3)
    wanted = (sequence.last @ head.lm_head.T).argmax(-1).tolist()
    for other in ({"greedy": False}, {"constrained": True}):  # by a grammar: what was allowed
        best = TargetRows(drafter, head).best_tokens(replace(sequence, **other))
        assert best.tolist() == wanted, other
        later = TargetRows(drafter, head).best_tokens(replace(sequence, **other), 7)
        assert later.tolist() == sequence.tokens[1:8].tolist() + wanted[7:]
