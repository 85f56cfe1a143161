"""A tree grown inside SGLang's own draft loop: its helpers, with ours around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_sgl.engine.cpu import install, needed

if needed():
    install()
pytest.importorskip("sglang")

from sglang.srt.speculative.eagle_utils import organize_draft_results
from sglang.srt.speculative.spec_utils import select_top_k_tokens

from aurora_sgl import wire
from aurora_sgl.draft_shape import NO_DRAFT, DraftShape
from aurora_sgl.engine.cpu.growing_tree import GrowingTree
from aurora_sgl.engine.parts import Parts
from aurora_sgl.engine.step_shape import StepShape
from aurora_sgl.engine.tree_choice import TreePolicy

WHOLE = DraftShape(3, 4, 8)
BATCH, VOCABULARY = 2, 50


class House:
    """The parts of SGLang's worker that its draft loop reads."""

    def __init__(self) -> None:
        numbers = {"speculative_num_steps": 3, "speculative_num_draft_tokens": 8}
        self.drafter = SimpleNamespace(draft_attn_backend=None, **numbers)
        self.worker = SimpleNamespace(draft_worker=self.drafter, topk=4, **numbers)
        self.notices: dict[str, str] = {}
        self.shape = StepShape(self.worker, WHOLE)
        self.tree = GrowingTree(self.shape, TreePolicy(WHOLE), Parts(self.notices))
        self.random = torch.Generator().manual_seed(0)

    def probs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = 3 * torch.randn(rows, VOCABULARY, generator=self.random)
        return logits.softmax(-1).topk(4, dim=-1)

    def step(self, *, opens: bool = True) -> dict[str, Any]:
        """As ``draft_forward`` of SGLang 0.5.23 does it, with its names."""
        states = [SimpleNamespace(speculates=True, one_token=False, greedy=True)] * BATCH
        made: dict[str, Any] = {}
        with self.shape.set_to(WHOLE):
            self.tree.forget()
            if opens:
                self.tree.begin(states)  # type: ignore[arg-type]
            score_list, token_list, parents_list = [], [], []
            p, index = self.probs(BATCH)
            hidden, scores = torch.zeros(BATCH, 1), None
            for i in range(self.drafter.speculative_num_steps):
                _, hidden, scores, info = self.tree.select(
                    select_top_k_tokens, i, p, index, hidden, scores, 4
                )
                for kept, one in zip((score_list, token_list, parents_list), info, strict=True):
                    kept.append(one)
                if i == self.drafter.speculative_num_steps - 1:
                    break
                p, index = self.probs(BATCH * 4)
            lists = score_list, token_list, parents_list
            nodes = self.drafter.speculative_num_draft_tokens
            made["result"] = self.tree.organize(organize_draft_results, *lists, nodes)
            made["lists"], made["levels"] = lists, len(score_list)
            made["numbers"] = (
                self.drafter.speculative_num_steps, self.worker.speculative_num_steps,
                self.drafter.speculative_num_draft_tokens,
                self.worker.speculative_num_draft_tokens,
            )  # fmt: skip
            made["shape"], made["keeps_kv"] = self.shape.current, self.shape.keeps_kv
        self.tree.done(0.030)
        return made


def test_what_is_verified_is_what_a_server_of_that_shape_would_have_drafted() -> None:
    house = House()
    shapes = set()
    for _ in range(80):
        made = house.step()
        shape, nodes = made["shape"], made["result"][1].shape[1] + 1
        levels = min(made["levels"], nodes - 1)
        assert made["numbers"] == (levels, max(1, levels), nodes, nodes)
        assert shape == (NO_DRAFT if nodes == 1 else DraftShape(made["levels"], 4, nodes))
        assert made["keeps_kv"] is (nodes == 1)
        expected = organize_draft_results(*made["lists"], nodes)
        for mine, theirs in zip(made["result"], expected, strict=True):
            assert torch.equal(mine, theirs)
        grown = house.tree.take()
        assert grown is not None and [len(one) for one in grown.chosen] == [nodes - 1] * BATCH
        house.tree.learn(grown, {0: [1] if nodes > 1 else [], 1: []})
        shapes.add((made["levels"], nodes))
        # The worker is as it was, whatever the step had.
        assert vars(house.worker)["speculative_num_steps"] == 3
        assert house.drafter.speculative_num_draft_tokens == 8 and not house.shape.keeps_kv
    assert len(shapes) > 5 and house.tree.policy.steps == 80 and not house.notices


def test_a_step_that_is_not_left_open_has_the_whole_shape() -> None:
    house = House()
    made = house.step(opens=False)
    assert made["numbers"] == (3, 3, 8, 8) and made["shape"] == WHOLE
    assert house.tree.take() is None and house.tree.policy.steps == 0


@pytest.mark.parametrize("part", ["level", "end"])
def test_a_choice_that_fails_leaves_the_whole_tree(part: str, monkeypatch) -> None:
    from aurora_sgl.engine.tree_choice import TreeStep

    def fails(*args: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(TreeStep, part, fails)
    house = House()
    made = house.step()
    assert made["numbers"] == (3, 3, 8, 8) and made["shape"] == WHOLE
    assert "boom" in house.notices["failed: choosing a step's drafts"]


def test_a_state_that_does_not_fit_gives_one_line(caplog: pytest.LogCaptureFixture) -> None:
    house = House()
    house.tree.remember(wire.Trees({"whole": [2, 4, 8]}, same_drafter=True))
    house.tree.remember(wire.Trees({"groups": 1}, same_drafter=True))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "trees up to [2, 4, 8], here [3, 4, 8]" in caplog.text
    house.step()
    other = House()
    other.tree.remember(wire.Trees(house.tree.policy.state(), same_drafter=False))
    assert other.tree.policy.groups == [BATCH]
