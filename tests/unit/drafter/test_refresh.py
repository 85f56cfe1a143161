"""A draft vocabulary that follows traffic."""

from __future__ import annotations

from pathlib import Path

import torch

from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.drafter.refresh import refresh
from tests.support.drafter_cases import target_folder

ROOT = Path(__file__).resolve().parents[3]


def test_rows_of_tokens_that_stay_move_with_them_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    target = target_folder(tmp_path / "target")
    drafter = scratch.make(target, draft_vocab_size=20, seed=1)
    held = drafter.target_ids.tolist()
    outside = [t for t in range(drafter.config.vocab_size) if t not in held][:5]
    counts = {**{token: 2 for token in held[:12]}, **{token: 3 for token in outside}}
    fresh = refresh(drafter, counts, always=held[-2:])
    new = fresh.drafter.target_ids.tolist()
    assert fresh.replaced == 5 and set(outside) < set(new) and len(new) == 20
    assert set(held[:12]) < set(new) and set(held[-2:]) < set(new)
    assert fresh.coverage_before < fresh.coverage == 1.0
    for row, token in enumerate(new):
        if token in held:
            assert torch.equal(
                fresh.drafter.lm_head.weight[row], drafter.lm_head.weight[held.index(token)]
            )
    assert checkpoint.validate(checkpoint.save(fresh.drafter, tmp_path / "fresh")) == []
    kept = {n: p for n, p in fresh.drafter.named_parameters() if "lm_head" not in n}
    assert all(torch.equal(p, dict(drafter.named_parameters())[n]) for n, p in kept.items())
    assert drafter.target_ids.tolist() == held, "the given drafter stays as it is"


def test_with_nothing_new_in_traffic_nothing_changes(tmp_path: Path) -> None:
    drafter = scratch.make(target_folder(tmp_path / "target"), draft_vocab_size=20, seed=1)
    same = refresh(drafter, {token: 1 for token in drafter.target_ids.tolist()})
    assert same.replaced == 0 and same.coverage == same.coverage_before == 1
    assert torch.equal(same.drafter.lm_head.weight, drafter.lm_head.weight)


def test_new_rows_have_what_rows_have_in_common(tmp_path: Path) -> None:
    """Of a well-trained drafter nearly all, or they win over what it learnt; of an untrained one
    nothing."""
    static = checkpoint.load(ROOT / "benchmarks" / "static-drafter").float()
    young = scratch.make(target_folder(tmp_path / "target"), draft_vocab_size=20, seed=1)
    for drafter, least, most in ((static, 0.85, 1.0), (young, -0.5, 0.5)):
        held = set(drafter.target_ids.tolist())
        outside = [t for t in range(drafter.config.vocab_size) if t not in held][:40]
        fresh = refresh(drafter, {token: 3 for token in outside}).drafter
        new = [row for row, token in enumerate(fresh.target_ids.tolist()) if token not in held]
        assert len(new) == min(40, len(outside), len(held))
        mean = drafter.lm_head.weight.detach().mean(0)
        along = fresh.lm_head.weight.detach()[new] @ mean / mean.square().sum()
        assert least < float(along.mean()) < most
        assert float(fresh.lm_head.weight.detach()[new].std(0).mean()) > 0.01, "no two are alike"
