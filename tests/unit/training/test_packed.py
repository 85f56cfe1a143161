"""Requests that share a program, and rows that are left out of it, against one at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_sgl.drafter import scratch
from aurora_sgl.drafter.architectures.eagle import EAGLE
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3
from aurora_sgl.drafter.attention import Seen, attend
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.packed import DraftedRows, PackedText
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training.loss import BatchLoss
from aurora_sgl.training.objectives import OBJECTIVES
from aurora_sgl.training.settings import TrainSettings
from tests.support.drafter_cases import HIDDEN, VOCAB, target_folder

LENGTHS = ((12, 5), (3, 2), (20, 9), (7, 6))  # tokens, and where the answer begins


def case(folder: Path, architecture: str = EAGLE3) -> tuple[Drafter, TargetHead, list[Sequence]]:
    """A drafter in float64 that is sure of little, and requests of different lengths."""
    target = target_folder(folder, tied=False)
    drafter = scratch.make(target, draft_vocab_size=24, architecture=architecture, seed=2)
    generator = torch.Generator().manual_seed(3)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3, generator=generator)
    width = drafter.config.feature_width
    data = [
        Sequence(
            number,
            torch.randint(0, VOCAB, (count,), generator=generator),
            torch.randn(count - 1, width, generator=generator).double(),
            torch.randn(count - 1, HIDDEN, generator=generator).double(),
            start,
            greedy=number % 2 == 0,
        )
        for number, (count, start) in enumerate(LENGTHS)
    ]
    head = TargetHead.load(target)
    head = TargetHead(head.embedding.double(), head.lm_head.double())
    return drafter.double(), head, data


def gradient(
    drafter: Drafter, head: TargetHead, batch: list[tuple[int, Sequence]], **settings: Any
) -> tuple[float, int, int, list[torch.Tensor]]:
    """Loss, positions, programs, and the gradient of each parameter."""
    losses = BatchLoss(drafter, head, TrainSettings(autocast=False, steps=4, **settings))
    drafter.zero_grad(set_to_none=True)
    total, positions, programs = 0.0, 0, 0
    for pack in losses.packs(batch, done=0.9):
        pack.value.backward()  # type: ignore[no-untyped-call]
        total, positions = total + pack.value.item(), positions + pack.positions
        programs += 1
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in drafter.parameters()]
    return total, positions, programs, [g.clone() for g in grads]


@pytest.mark.parametrize("architecture", [EAGLE3, EAGLE])
def test_a_packed_update_has_the_gradient_of_its_requests_one_by_one(
    tmp_path: Path, architecture: str
) -> None:
    drafter, head, data = case(tmp_path / "t", architecture)
    batch = list(enumerate(data))
    whole = gradient(drafter, head, batch)
    assert whole[2] == 1
    alone = [gradient(drafter, head, [one]) for one in batch]
    assert whole[1] == sum(one[1] for one in alone) == 10 + 1 + 18 + 5
    assert whole[0] == pytest.approx(sum(one[0] for one in alone), rel=1e-12)
    for number, packed in enumerate(whole[3]):
        torch.testing.assert_close(packed, sum(one[3][number] for one in alone))


def test_the_loss_of_a_request_is_the_decayed_mean_over_the_rows_that_each_step_has(
    tmp_path: Path,
) -> None:
    drafter, head, data = case(tmp_path / "t")
    one, count = data[2], 18
    ids = drafter.target_ids
    text = PackedText.of([(one.tokens[:19], one.features)], [(0, count)])
    best = (one.last @ head.lm_head.T).argmax(-1)
    best[one.output_start - 1 :] = one.tokens[one.output_start :]
    wanted = 0.0
    for k, step in enumerate(drafter.unroll(text, head, steps=4, dtype=torch.float64)):
        rows = torch.arange(count - k)
        p = (one.last[rows + 1 + k] @ head.lm_head[ids].T).softmax(-1)
        losses = -(p * step.logits.log_softmax(-1)).sum(-1)
        inside = torch.isin(best[rows + 1 + k], ids)
        wanted += 0.8**k * float((losses * inside).mean().detach()) * count
    found = gradient(drafter, head, [(2, one)], objective="forward_kl")[0]
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_of_few_rows_add_up_to_the_whole_whatever_the_objective(
    tmp_path: Path, objective: str
) -> None:
    if objective in ("policy_gradient", "distil_then_rl"):
        pytest.skip("its roll-outs are drawn by part")
    drafter, head, data = case(tmp_path / "t")
    batch = list(enumerate(data))
    given = {"objective": objective, "rl_share": 1.0}
    whole = gradient(drafter, head, batch, **given)
    parts = gradient(drafter, head, batch, **given, piece_bytes=1)  # 8 rows
    assert (whole[2], parts[2]) == (1, 5) and whole[1] == parts[1]
    assert whole[0] == pytest.approx(parts[0], rel=1e-9)
    for a, b in zip(whole[3], parts[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_no_request_of_a_pack_sees_another_one(tmp_path: Path) -> None:
    drafter, head, data = case(tmp_path / "t")
    other = replace(data[2], features=torch.randn_like(data[2].features))
    found = []
    for middle in (data[2], other):
        texts = [(one.tokens, one.features) for one in (data[0], middle, data[3])]
        with torch.no_grad():
            text = PackedText.of(texts, [(2, 11), (0, 18), (1, 5)])
            found.append(drafter.unroll(text, head, steps=3, dtype=torch.float64))
    for one, two in zip(*found, strict=True):
        begin, end = one.base.counts[0], sum(one.base.counts[:2])
        assert torch.equal(one.logits[:begin], two.logits[:begin])
        assert torch.equal(one.logits[end:], two.logits[end:])
        assert not torch.equal(one.logits[begin:end], two.logits[begin:end])


def test_short_requests_share_a_block_of_the_backward_without_seeing_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU; here the same gradients as request by request."""
    generator = torch.Generator().manual_seed(0)
    checkered = torch.arange(3)[:, None] + torch.arange(5) > 3
    last = torch.tensor([2, 3, 4, 0, 1, 1, 3, 4])
    whole = Seen.up_to(last, [3, 2, 3], [5, 2, 5])
    masked = Seen.masks([checkered, torch.ones(2, 2) > 0])
    for visibility, few in ((whole, 8), (masked, 5), (Seen.run([2, 0], [3, 2]), 5)):
        shapes = ((few, 4), (visibility.text, 2), (visibility.text, 2))
        inputs = [
            torch.randn(*shape, 8, generator=generator).double().requires_grad_()
            for shape in shapes
        ]
        apart = torch.autograd.grad(attend(*inputs, visibility).pow(2).sum(), inputs)
        groups = visibility.groups(1000, 100)
        assert [len(group) for group in groups] == [len(list(visibility.requests()))]
        assert len(visibility.groups(16, 100)) > 1
        with monkeypatch.context() as patch:
            patch.setattr(Seen, "blocks", partialmethod(Seen.blocks, shared=True))
            together = torch.autograd.grad(attend(*inputs, visibility).pow(2).sum(), inputs)
        for a, b in zip(apart, together, strict=True):
            torch.testing.assert_close(a, b)


def test_rows_that_cannot_be_reached_are_not_computed_and_change_nothing(tmp_path: Path) -> None:
    drafter, head, data = case(tmp_path / "t")
    texts = [(one.tokens, one.features) for one in data]
    text = PackedText.of(texts, [(0, len(one.tokens) - 2) for one in data])
    generator = torch.Generator().manual_seed(1)
    chosen = [torch.rand(40, generator=generator) < 0.6 for _ in range(3)]

    def keep(step: int, drafted: DraftedRows) -> torch.Tensor:
        return chosen[step][drafted.base.number]

    whole = drafter.unroll(text, head, steps=4, dtype=torch.float64)
    few = drafter.unroll(text, head, steps=4, keep=keep, dtype=torch.float64)
    values, alive = [], torch.ones(40, dtype=torch.bool)
    for k, (all_rows, some) in enumerate(zip(whole, few, strict=True)):
        left = alive[all_rows.base.number]
        assert torch.equal(all_rows.base.number[left], some.base.number)
        torch.testing.assert_close(all_rows.logits[left], some.logits)
        values.append((all_rows.logits[left].pow(2).sum(), some.logits.pow(2).sum()))
        alive = alive & (chosen[k] if k < 3 else alive)
    assert len(few[3].base) < len(whole[3].base)
    wanted, got = (
        torch.autograd.grad(sum(pair[side] for pair in values), list(drafter.parameters()))
        for side in (0, 1)
    )
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b)
