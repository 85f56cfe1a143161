"""What the learning benchmarks take for a server's log is what replay counts."""

from __future__ import annotations

from pathlib import Path

from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.replay import is_determined, replay_one
from benchmarks.learning import served
from benchmarks.measure import SHAPES
from benchmarks.static_drafter import LARGEST
from tests.support.drafter_cases import VOCAB, requests, target_folder


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
            if is_determined(step.root, step.accepted, len(one.tokens), shape.depth)
        ]
        replayed = replay_one(drafter, one, shape, head)
        assert len(steps) == replayed.verify_steps
        assert sum(step.accepted for step in steps) == replayed.accepted
        assert all(len(step.tokens) == shape.nodes - 1 for step in steps)
        accepted += replayed.accepted
    assert accepted > 0, "nothing was accepted: the comparison says nothing"


def test_the_static_drafter_of_the_repository_serves_and_names_no_machine() -> None:
    folder = Path(__file__).parents[3] / "benchmarks" / "static-drafter"
    assert checkpoint.validate(folder, None) == []
    assert sum(file.stat().st_size for file in folder.iterdir()) <= LARGEST
    config = (folder / "config.json").read_text()
    assert '"target_model": "SmolLM2-135M-Instruct"' in config and "/" not in config
