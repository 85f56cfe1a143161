"""A drafter architecture and an objective that this module alone brings, as CONTRIBUTING says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import nn

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.drafter.architectures import ARCHITECTURES, has_algorithm, read_config
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.model import Draft, Drafter
from aurora_sgl.drafter.packed import DraftedRows, Keep, PackedText
from aurora_sgl.drafter.target import TargetHead, TargetInfo, read_target
from aurora_sgl.evaluation.replay import replay, replay_both
from aurora_sgl.training.objectives import OBJECTIVES
from aurora_sgl.training.objectives.base import (
    NEVER,
    Loss,
    LossContext,
    UnrolledStep,
    decayed_mean,
)
from aurora_sgl.training.objectives.settings import ObjectiveSettings
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from tests.support.drafter_cases import VOCAB, requests, target_folder


class Bigram(Drafter):
    """Reads the last hidden state and the last token, without attention, and drafts a chain."""

    architecture = "ToyBigram"
    algorithm = "TOY"
    has_own_head = False
    has_draft_vocabulary = False

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.mix = nn.Linear(2 * config.hidden_size, config.hidden_size)

    @classmethod
    def fields_from_json(cls, raw: Mapping[str, Any], target_layers: int) -> dict[str, Any]:
        return {"draft_vocab_size": int(raw["vocab_size"])}

    @classmethod
    def fields_to_json(cls, config: DrafterConfig) -> dict[str, Any]:
        return {"num_hidden_layers": 0}

    @classmethod
    def fields_for(cls, target: TargetInfo, draft_vocab_size: int) -> dict[str, Any]:
        return {"draft_vocab_size": target.vocab_size}

    @classmethod
    def features(cls, aux: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return last

    @classmethod
    def parameter_name(cls, name: str) -> str | None:
        return None if "embed_tokens" in name else name

    @property
    def device(self) -> torch.device:
        return self.mix.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mix.weight.dtype

    def step(self, embeds: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mix(torch.cat((embeds, state.to(embeds.dtype)), -1)).tanh()
        return out

    def unroll(
        self,
        text: PackedText,
        head: TargetHead,
        *,
        steps: int,
        keep: Keep | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[DraftedRows]:
        base, parent = text.base(), None
        embeds, state = head.embed(text.tokens, dtype), text.features[base.rows]
        drafted: list[DraftedRows] = []
        for k in range(steps):
            if k:
                base, parent = base.after(k, keep(k - 1, drafted[-1]) if keep else None)
                state = state[parent]
            state = self.step(embeds[base.tokens + 1 + k], state)
            logits = (state @ head.lm_head.to(state.dtype).T).float()
            drafted.append(DraftedRows(logits, base, parent))
        return drafted

    def propose(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        roots: torch.Tensor,
        shape: DraftShape,
        head: TargetHead,
    ) -> list[Draft]:
        token, state, chain = tokens[roots], features[roots - 1], []
        for _ in range(shape.depth):
            state = self.step(head.embed(token, self.dtype), state)
            token = (state @ head.lm_head.to(state.dtype).T).argmax(-1)
            chain.append(token)
        parents = list(range(shape.depth))
        return [Draft(row, parents) for row in torch.stack(chain, 1).tolist()]


class MarginLoss:
    """The target's best token should lead the strongest other one by one nat of log q."""

    name = "toy_margin"
    needs_mass = False
    needs_proposals = False
    reference_from = NEVER
    reach = 0

    def __init__(self, step_decay: float) -> None:
        self.step_decay = step_decay

    @classmethod
    def from_settings(cls, settings: ObjectiveSettings) -> Self:
        return cls(settings.step_decay)

    def __call__(self, steps: Sequence[UnrolledStep], context: LossContext = LossContext()) -> Loss:  # noqa: B008
        losses = [self._behind(step) for step in steps]
        weights = [step.weight * (step.token >= 0) for step in steps]
        return Loss(decayed_mean(losses, weights, self.step_decay), {"margin": 1.0})

    @staticmethod
    def _behind(step: UnrolledStep) -> torch.Tensor:  # [rows]
        own = step.token.clamp(min=0)[:, None]
        rival = step.log_q.scatter(-1, own, float("-inf")).max(-1).values
        return (1 - step.log_q.gather(-1, own).squeeze(-1) + rival).clamp(min=0)


@pytest.fixture
def toys() -> Iterator[None]:
    ARCHITECTURES[Bigram.architecture] = Bigram
    OBJECTIVES[MarginLoss.name] = MarginLoss
    yield
    del ARCHITECTURES[Bigram.architecture], OBJECTIVES[MarginLoss.name]


SHAPE: dict[str, Any] = {"depth": 3, "topk": 1, "nodes": 4, "served_dtype": "float32"}
FEW: dict[str, Any] = {"passes": 1, "autocast": False, "learning_rate": 5e-3, **SHAPE}


def world(folder: Path, architecture: str) -> tuple[Drafter, TargetHead, Path]:
    target = target_folder(folder / "target")
    drafter = scratch.make(target, draft_vocab_size=VOCAB, architecture=architecture, seed=1)
    return drafter, TargetHead.load(target), target


def fitting(drafter: Drafter, head: TargetHead, count: int, seed: int = 0) -> list[Any]:
    """Requests whose traces hold what this architecture takes of them."""
    return [
        replace(one, features=drafter.features(one.features, one.last))
        for one in requests(head, count, seed)
    ]


@pytest.mark.parametrize("objective", ["forward_kl", MarginLoss.name])
@pytest.mark.usefixtures("toys")
def test_a_new_architecture_trains_is_kept_and_replays(tmp_path: Path, objective: str) -> None:
    drafter, head, target = world(tmp_path, Bigram.architecture)
    settings = TrainSettings(objective=objective, **FEW)
    result = train(drafter, fitting(drafter, head, 3), head, settings)
    assert result.updates == 3 and result.metrics["loss_last_pass"] is not None

    folder = checkpoint.save(result.drafter, tmp_path / "kept", dtype=torch.float32)
    assert checkpoint.validate(folder, read_target(target)) == []
    assert read_config(folder) == drafter.config and has_algorithm("toy")
    loaded = checkpoint.load(folder)
    assert isinstance(loaded, Bigram)
    held_out = fitting(drafter, head, 4, seed=7)
    assert replay(loaded, held_out, settings.shape, head) == replay(
        result.drafter, held_out, settings.shape, head
    )


@pytest.mark.usefixtures("toys")
def test_a_new_architecture_learns_what_replay_then_accepts(tmp_path: Path) -> None:
    drafter, head, _ = world(tmp_path, Bigram.architecture)
    settings = TrainSettings(**{**FEW, "passes": 40})
    trained = train(drafter, fitting(drafter, head, 20), head, settings).drafter
    before, after = replay_both(drafter, trained, fitting(drafter, head, 6, 7), head, settings)
    assert sum(r.accepted for r in after) > sum(r.accepted for r in before)


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_new_objective_trains_the_drafters_that_are_there(
    tmp_path: Path, architecture: str
) -> None:
    drafter, head, _ = world(tmp_path, architecture)
    settings = TrainSettings(objective=MarginLoss.name, **FEW)
    result = train(drafter, fitting(drafter, head, 3), head, settings)
    assert result.updates == 3 and result.metrics["margin_last_pass"] == 1.0


def test_without_their_rows_neither_is_known(tmp_path: Path) -> None:
    assert Bigram.architecture not in ARCHITECTURES and not has_algorithm("toy")
    with pytest.raises(ValueError, match="objective must be one of forward_kl"):
        TrainSettings(objective=MarginLoss.name)
