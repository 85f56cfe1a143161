"""Which weights an optimizer steps, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aurora_sgl.drafter import scratch
from aurora_sgl.errors import AuroraError
from aurora_sgl.training.optimizer import Optimizer
from aurora_sgl.training.settings import TrainSettings
from tests.support.drafter_cases import target_folder


def test_muon_steps_the_layers_matrices_and_adamw_head_and_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_sgl.machine.native_bfloat16", lambda: True)
    drafter = scratch.make(target_folder(tmp_path / "t"), draft_vocab_size=24, seed=1).float()
    optimizer = Optimizer(drafter, TrainSettings(optimizer="muon", learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in drafter.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in drafter.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(0.5)
    by_muon = {id(p) for group in optimizer.parts[1].param_groups for p in group["params"]}
    for name, parameter in drafter.named_parameters():
        change = parameter.detach() - before[name]
        inner = parameter.ndim == 2 and name != "lm_head.weight"
        assert (id(parameter) in by_muon) == inner
        if inner:  # an orthogonal matrix: all singular values alike, and none as with AdamW
            values = torch.linalg.svdvals(change)
            assert float(values.max() / values.min()) < 3
        else:
            torch.testing.assert_close(change.abs(), torch.full_like(change, 0.05), rtol=1e-3,
                                       atol=1e-6)  # fmt: skip


def test_muon_is_refused_in_one_line_where_it_would_take_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_sgl.machine.native_bfloat16", lambda: False)
    drafter = scratch.make(target_folder(tmp_path / "t"), draft_vocab_size=24, seed=1)
    with pytest.raises(AuroraError, match="use adamw"):
        Optimizer(drafter, TrainSettings(optimizer="muon"))
