"""Replay: what a drafter would have had accepted, equal to a plain step-by-step server."""

from __future__ import annotations

import functools

import pytest
import torch
from pydantic import ValidationError

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter import architectures
from aurora_sgl.drafter.architectures.eagle import EAGLE
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.drafter.vocabulary import maps
from aurora_sgl.evaluation import device
from aurora_sgl.evaluation.replay import is_determined, replay, replay_one
from aurora_sgl.evaluation.settings import EvaluationSettings
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training.settings import TrainSettings
from tests.support.drafter_cases import good_drafter
from tests.support.drafter_twin import PlainDrafter, served

VOCAB, HIDDEN = 23, 16


def tiny(architecture: str, seed: int) -> tuple[Drafter, TargetHead]:
    torch.manual_seed(seed)
    eagle3 = architecture == EAGLE3
    config = DrafterConfig(
        architecture=architecture,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        vocab_size=VOCAB,
        draft_vocab_size=17 if eagle3 else VOCAB,
        rms_norm_eps=1e-5,
        rope_theta=100.0,
        max_positions=64,
        aux_layers=(1, 2, 3) if eagle3 else (),
    )
    drafter = architectures.build(config)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.6)
    if eagle3:
        drafter.d2t, drafter.t2d = maps(torch.arange(3, 20), VOCAB)
    # A soft head: scores that saturate to 1 tie, and ties have no order in either implementation.
    return drafter, TargetHead(torch.randn(VOCAB, HIDDEN), 0.005 * torch.randn(VOCAB, HIDDEN))


def request(drafter: Drafter, head: TargetHead, seed: int) -> Sequence:
    """A request whose continuation follows the drafter now and then, so that drafts are accepted.

    A third of its tokens are the drafter's own best guess, the rest are random.
    """
    generator = torch.Generator().manual_seed(seed)
    total, start = 26, 5
    tokens = torch.randint(0, VOCAB, (total,), generator=generator)
    width = drafter.config.feature_width
    features = torch.randn(total - 1, width, generator=generator)
    plain = PlainDrafter(drafter.config, drafter.state_dict(), head.embedding, head.lm_head)
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i in range(total - 2):
        probs, _, kv = plain.row(int(tokens[i + 1]), features[i], i, rows)
        rows.append(kv)
        choice = int(torch.randint(0, 6, (1,), generator=generator))
        if choice < 4:
            tokens[i + 2] = plain.target_id(int(probs.topk(4).indices[min(choice, 3)]))
    return Sequence(seed, tokens, features, features[:, :HIDDEN], start)


@functools.cache
def case(architecture: str, seed: int) -> tuple[Drafter, TargetHead, list[Sequence]]:
    """Shapes of one seed share a drafter and its requests; neither is changed."""
    drafter, head = tiny(architecture, seed)
    return drafter, head, [request(drafter, head, number) for number in range(3)]


SHAPES = [
    DraftShape(1),
    DraftShape(4),
    DraftShape(1, 4, 5),
    DraftShape(3, 2, 5),
    DraftShape(3, 4, 8),
    DraftShape(4, 3, 16),
    DraftShape(3, 8, 16),
    DraftShape(5, 8, 24),
]


@pytest.mark.parametrize("architecture", [EAGLE3, EAGLE])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.depth}-{s.topk}-{s.nodes}")
def test_fast_replay_agrees_with_a_plain_server_step_by_step(
    architecture: str, shape: DraftShape
) -> None:
    drafter, head, requests = case(architecture, shape.depth + shape.topk)
    plain = PlainDrafter(drafter.config, drafter.state_dict(), head.embedding, head.lm_head)
    seen = set()
    for sequence in requests:
        with torch.no_grad():
            steps = served(
                plain,
                sequence.tokens.tolist(),
                sequence.features,
                sequence.output_start,
                shape.depth,
                shape.topk,
                shape.nodes,
            )
        length = len(sequence.tokens)
        known = [(r, a) for r, a in steps if is_determined(r, a, length, shape.depth)]
        result = replay_one(drafter, sequence, shape, head)
        assert (result.verify_steps, result.accepted) == (len(known), sum(a for _, a in known))
        seen.update(a for _, a in known)
    assert len(seen) > 1, "the case must hold both accepted and rejected drafts"


def test_a_step_that_reaches_the_end_of_the_log_before_its_depth_is_undetermined() -> None:
    # 10 tokens, draft of depth 4: from root 7 two tokens are known.
    assert is_determined(7, 1, 10, 4)
    assert not is_determined(7, 2, 10, 4)
    assert is_determined(7, 2, 10, 2)
    assert not is_determined(9, 0, 10, 4)


def test_features_that_end_early_end_the_replay_early() -> None:
    drafter, head = tiny(EAGLE3, 0)
    whole = request(drafter, head, 1)
    cut = Sequence(1, whole.tokens, whole.features[:10], whole.last[:10], whole.output_start)
    short = replay_one(drafter, cut, DraftShape(3), head)
    assert 0 < short.verify_steps < replay_one(drafter, whole, DraftShape(3), head).verify_steps


def test_shapes_that_no_server_can_serve_are_refused() -> None:
    for bad in ({"depth": 3, "topk": 1, "nodes": 7}, {"depth": 1, "topk": 4, "nodes": 9}):
        with pytest.raises(ValueError, match="nodes"):
            DraftShape(**bad)


@pytest.mark.parametrize(
    "bad", [{"nodes": 500}, {"depth": 2, "topk": 2, "nodes": 8}, {"depth": 1, "nodes": 6}]
)
def test_settings_with_a_shape_that_no_server_can_serve_are_refused_before_anything_is_read(
    bad: dict[str, int],
) -> None:
    for settings in (EvaluationSettings, TrainSettings):
        with pytest.raises(ValidationError, match="nodes"):
            settings(**bad)


def test_replay_in_bfloat16_differs_from_float32_only_a_little() -> None:
    drafter, head = tiny(EAGLE3, 3)
    sequences = [request(drafter, head, seed) for seed in range(8)]
    wide = AcceptCounts.of(replay(drafter, sequences, DraftShape(3, 4, 8), head)).accept_length
    narrow = AcceptCounts.of(
        replay(drafter.bfloat16(), sequences, DraftShape(3, 4, 8), head)
    ).accept_length
    assert abs(wide - narrow) < 0.1 * wide


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_without_bfloat16_products_replays_the_served_weights_in_float32(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_sgl.machine.native_bfloat16", lambda: native)
    drafter = good_drafter()
    served = device.as_served(drafter, EvaluationSettings())
    assert served.dtype == (torch.bfloat16 if native else torch.float32)
    assert drafter.dtype == torch.float32 and not served.training
    for own, original in zip(served.parameters(), drafter.parameters(), strict=True):
        assert torch.equal(own.float(), original.bfloat16().float())
    whole = device.as_served(drafter, EvaluationSettings(served_dtype="float32"))
    assert all(map(torch.equal, whole.parameters(), drafter.parameters()))
