"""What the learning benchmarks take for a server's log is what replay counts."""

from __future__ import annotations

from pathlib import Path

from drafter_cases import VOCAB, requests, target_folder

from aurora_sgl.drafter import scratch
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.training.replay import determined, replay_one
from benchmarks.learning import served
from benchmarks.measure import SHAPES


def test_the_verify_steps_of_a_served_request_are_those_of_replay(tmp_path: Path) -> None:
    target = target_folder(tmp_path / "t")
    drafter = scratch.make(target, draft_vocab_size=VOCAB, seed=1)
    head = TargetHead.load(target)
    shape = SHAPES["tree"]
    accepted = 0
    for one in requests(head, 6, seed=3):
        steps = [
            step
            for step in served(drafter, one, head)
            if determined(step.root, step.accepted, len(one.tokens), shape.depth)
        ]
        replayed = replay_one(drafter, one, shape, head)
        assert len(steps) == replayed.verify_steps
        assert sum(step.accepted for step in steps) == replayed.accepted
        assert all(len(step.tokens) == shape.nodes - 1 for step in steps)
        accepted += replayed.accepted
    assert accepted > 0, "nothing was accepted: the comparison says nothing"
