"""Drafter, replay and trainer on CUDA against the CPU. Skipped without a GPU."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from drafter_cases import target_folder
from test_training_trainer import RECIPE, requests

from aurora_sgl.drafter import scratch
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.training.replay import DraftShape, proposals_at, replay
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from aurora_sgl.training.unroll import unroll

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda", 0)


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
        assert proposals_at(on_gpu, held_out[0], roots, shape, head) == proposals_at(
            drafter, held_out[0], roots, shape, head
        )


def test_unrolled_steps_have_the_same_logits_and_gradients(tmp_path: Path) -> None:
    target = target_folder(tmp_path / "t")
    head = TargetHead.load(target)
    (sequence,) = requests(head, 1)
    drafter = scratch.make(target, draft_vocab_size=40)
    gradients = []
    for device in (torch.device("cpu"), GPU):
        mine = copy.deepcopy(drafter).to(device)
        logits = unroll(
            mine, sequence.to(device), head.to(device), first_row=0, last_row=20, steps=4
        )
        torch.stack([x.pow(2).mean() for x in logits]).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad.cpu() for p in mine.parameters() if p.grad is not None])
    for cpu, gpu in zip(*gradients, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-6)


def test_a_run_on_the_gpu_learns(tmp_path: Path) -> None:
    target = target_folder(tmp_path / "t")
    head = TargetHead.load(target)
    settings = TrainSettings(**{**RECIPE, "device": "cuda", "autocast": True})
    result = train(scratch.make(target, draft_vocab_size=40), requests(head, 30), head, settings)
    assert result.drafter.device.type == "cpu"
    assert result.metrics["loss_last_pass"] < result.metrics["loss_first_pass"]
