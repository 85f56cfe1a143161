"""Drafter, replay and trainer on CUDA against the CPU. Skipped without a GPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter import attention, scratch
from aurora_sgl.drafter.packed import PackedText
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.replay import replay
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from tests.support.drafter_cases import RECIPE, requests, target_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)
#: Heads as wide as FlashInfer's kernels take them.
WIDE = {"head_dim": 64}


def test_replay_on_the_gpu_drafts_and_accepts_what_the_cpu_does(tmp_path: Path) -> None:
    target = target_folder(tmp_path / "t")
    head = TargetHead.load(target)
    settings = TrainSettings(**{**RECIPE, "device": "cpu", "passes": 3})
    drafter = train(
        scratch.make(target, draft_vocab_size=40), requests(head, 20), head, settings
    ).drafter
    on_gpu = copy.deepcopy(drafter).to(GPU)
    held_out = requests(head, 8, seed=7)
    for shape in (DraftShape(3), DraftShape(3, 4, 8)):
        assert replay(on_gpu, held_out, shape, head) == replay(drafter, held_out, shape, head)
        roots = torch.tensor([7, 12])
        text = (held_out[0].tokens, held_out[0].features)
        there = on_gpu.propose(*text, roots, shape, head)
        assert there == drafter.propose(*text, roots, shape, head)


def test_replay_in_bfloat16_through_flashinfer_accepts_as_much_as_on_the_cpu(
    tmp_path: Path,
) -> None:
    pytest.importorskip("flashinfer")
    target = target_folder(tmp_path / "t", **WIDE)
    head = TargetHead.load(target)
    settings = TrainSettings(**{**RECIPE, "device": "cpu", "passes": 3})
    drafter = train(
        scratch.make(target, draft_vocab_size=40), requests(head, 20), head, settings
    ).drafter.bfloat16()
    held_out = requests(head, 20, seed=7)
    for shape in (DraftShape(3), DraftShape(3, 4, 8)):
        on_cpu = AcceptCounts.of(replay(drafter, held_out, shape, head)).accept_length
        with attention.using("flashinfer"):
            on_gpu = AcceptCounts.of(
                replay(copy.deepcopy(drafter).to(GPU), held_out, shape, head)
            ).accept_length
        assert on_gpu == pytest.approx(on_cpu, abs=0.05) and on_gpu > 1.2


@pytest.mark.parametrize("backend", ["sdpa", "flashinfer"])
def test_unrolled_steps_have_the_same_logits_and_gradients(tmp_path: Path, backend: str) -> None:
    if backend == "flashinfer":
        pytest.importorskip("flashinfer")
    target = target_folder(tmp_path / "t", **WIDE)
    head = TargetHead.load(target)
    (sequence,) = requests(head, 1)
    drafter = scratch.make(target, draft_vocab_size=40)
    # FlashInfer has no float32: there both sides run under autocast, and rounding is allowed for.
    half = backend == "flashinfer"
    found = []
    for device in (torch.device("cpu"), GPU):
        mine = copy.deepcopy(drafter).to(device)
        with (
            attention.using(backend if device == GPU else "sdpa"),
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            given = sequence.to(device)
            text = PackedText.of([(given.tokens, given.features)], [(0, 20)])
            logits = [one.logits for one in mine.unroll(text, head.to(device), steps=4)]
            torch.stack([x.pow(2).mean() for x in logits]).sum().backward()  # type: ignore[no-untyped-call]
        grads = [p.grad.cpu() for p in mine.parameters() if p.grad is not None]
        found.append([x.detach().cpu() for x in logits] + grads)
    for cpu, gpu in zip(*found, strict=True):
        if half:
            assert float((gpu - cpu).norm() / cpu.norm()) < 0.05
        else:
            torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_a_run_on_the_gpu_learns(tmp_path: Path, backend: str) -> None:
    target = target_folder(tmp_path / "t", **WIDE)
    head = TargetHead.load(target)
    settings = TrainSettings(**{**RECIPE, "device": "cuda", "autocast": True})
    drafter = scratch.make(target, draft_vocab_size=40)
    held_out = requests(head, 12, seed=7)
    with attention.using(backend):
        result = train(drafter, requests(head, 30), head, settings)
    assert result.drafter.device.type == "cpu"
    assert result.metrics["loss_last_pass"] < result.metrics["loss_first_pass"]
    before, after = (
        AcceptCounts.of(replay(d, held_out, settings.shape, head)).accept_length
        for d in (drafter, result.drafter)
    )
    assert after > before + 0.7
