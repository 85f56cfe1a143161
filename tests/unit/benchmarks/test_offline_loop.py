"""The loop without a server is the one that ships: a store, a run, the gate, the promotion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence, TargetSampling
from aurora_sgl.training.settings import TrainSettings
from benchmarks.offline_loop import OfflineLoop
from tests.support.drafter_cases import RECIPE, requests, target_folder

SETTINGS = TrainSettings(**{**RECIPE, "gate_share": 0.3})


@pytest.fixture
def loop(tmp_path: Path) -> OfflineLoop:
    target = target_folder(tmp_path / "target")
    drafter = scratch.make(target, draft_vocab_size=40, seed=1, model=str(target))
    folder = checkpoint.save(drafter, tmp_path / "start")
    return OfflineLoop(tmp_path / "home", folder, target, SETTINGS, source="scratch")


def answered(head: TargetHead, count: int, seed: int = 0) -> list[Sequence]:
    return [
        replace(one, accept_rule="greedy", conversation=f"{seed}-{one.request_id}")
        for one in requests(head, count, seed=seed)
    ]


def test_a_candidate_that_passes_goes_live_and_the_next_run_starts_from_it(
    loop: OfflineLoop,
) -> None:
    head = TargetHead.load(loop.target)
    loop.serve(answered(head, 60))
    first = loop.train()
    assert (first.status, first.verdict, loop.live_id()) == ("succeeded", "pass", first.version_id)
    trained = loop.trained_tokens()
    loop.serve(answered(head, 20, seed=5))
    second = loop.train(max_seconds=0.01)
    assert second.metrics["base_trained_tokens"] == trained > 0
    assert loop.load(loop.live_id()).config == loop.load(1).config


def test_sampled_requests_are_judged_by_their_rule(loop: OfflineLoop) -> None:
    head = TargetHead.load(loop.target)
    loop.serve(
        [
            replace(one, greedy=False, accept_rule="target_sampling", sampling=TargetSampling(0.7))
            for one in answered(head, 40)
        ]
    )
    outcome = loop.train()
    assert outcome.status == "succeeded"
    assert set(outcome.metrics["gate_rules"]) == {"target_sampling"}
