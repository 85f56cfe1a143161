"""Untrained drafters, draft vocabularies and the target's two tensors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from aurora_sgl.drafter import scratch, vocabulary
from aurora_sgl.drafter.architectures.eagle import EAGLE
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3, aux_layers_of
from aurora_sgl.drafter.target import TargetHead, read_target
from aurora_sgl.errors import AuroraError
from tests.support.drafter_cases import HIDDEN, VOCAB, target_folder
from tests.support.drafter_twin import PlainDrafter


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_drafter_is_made_for_any_llama_family_target(tmp_path: Path, kind: str) -> None:
    target = target_folder(tmp_path / kind, model_type=kind, head_dim=8)
    drafter = scratch.make(target, counts={5: 3, 7: 2}, draft_vocab_size=12)
    assert drafter.config.head_dim == 8
    assert drafter.config.aux_layers == (2, 4, 5)
    ids = drafter.target_ids.tolist()
    assert len(ids) == 12 and {5, 7, 2} <= set(ids)  # 2: the end of the sequence
    assert drafter.t2d.nonzero().flatten().tolist() == ids


def test_other_targets_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="mamba model; drafters are made for llama"):
        scratch.make(target_folder(tmp_path / "m", model_type="mamba"))
    with pytest.raises(AuroraError, match=r"config\.json is missing"):
        scratch.make(tmp_path / "nowhere")
    with pytest.raises(AuroraError, match="at least 4 layers"):
        scratch.make(target_folder(tmp_path / "s", num_hidden_layers=3))
    with pytest.raises(AuroraError, match=r"tokenizer\.json"):
        scratch.make(target_folder(tmp_path / "t"), texts=["hello"])


def test_auxiliary_layers_are_three_distinct_ones_in_order() -> None:
    for layers in range(4, 80):
        low, middle, high = aux_layers_of(layers)
        assert 0 < low < middle < high < layers
    assert aux_layers_of(30) == (2, 15, 27)


def test_the_same_seed_makes_the_same_drafter_and_leaves_torch_alone(tmp_path: Path) -> None:
    target = target_folder(tmp_path / "t")
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    a, b = (scratch.make(target, draft_vocab_size=9, seed=4) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_vocabulary_takes_the_most_frequent_then_the_lowest_ids() -> None:
    counts = Counter({30: 9, 31: 8, 32: 1})
    assert vocabulary.choose(counts, 4, VOCAB, always=[2]).tolist() == [2, 30, 31, 32]
    assert vocabulary.choose(counts, 6, VOCAB).tolist() == [0, 1, 2, 30, 31, 32]
    assert vocabulary.choose(counts, 2, VOCAB).tolist() == [30, 31]
    assert len(vocabulary.choose({}, 999, VOCAB)) == VOCAB


def test_vocabulary_maps_are_inverse_to_each_other() -> None:
    ids = torch.tensor([1, 5, 6, 20])
    d2t, t2d = vocabulary.maps(ids, VOCAB)
    assert (d2t + torch.arange(4)).tolist() == ids.tolist()
    draft_of = vocabulary.inverse(ids, VOCAB)
    assert draft_of[ids].tolist() == [0, 1, 2, 3]
    assert (draft_of >= 0).tolist() == t2d.tolist()
    assert vocabulary.coverage({1: 3, 2: 1}, ids) == 0.75


@pytest.mark.parametrize("files", [1, 3])
def test_embedding_and_head_are_read_tied_or_not_in_one_file_or_many(
    tmp_path: Path, files: int
) -> None:
    tied = TargetHead.load(target_folder(tmp_path / "tied", files=files))
    assert tied.lm_head is tied.embedding or torch.equal(tied.lm_head, tied.embedding)
    own = TargetHead.load(target_folder(tmp_path / "own", tied=False, files=files))
    assert not torch.equal(own.lm_head, own.embedding)
    assert own.embed(torch.tensor([[1, 2]]), torch.float32).shape == (1, 2, HIDDEN)


def test_a_missing_tensor_or_broken_file_is_named(tmp_path: Path) -> None:
    folder = target_folder(tmp_path / "t", tied=True)
    raw = (
        (folder / "config.json")
        .read_text()
        .replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    (folder / "config.json").write_text(raw)
    with pytest.raises(AuroraError, match=r"lm_head\.weight"):
        TargetHead.load(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(AuroraError, match="cannot read"):
        TargetHead.load(folder)


@pytest.mark.parametrize("architecture", [EAGLE3, EAGLE])
def test_a_text_pass_equals_the_plain_twin_row_by_row(tmp_path: Path, architecture: str) -> None:
    target = target_folder(tmp_path / "t")
    head = TargetHead.load(target)
    drafter = scratch.make(target, draft_vocab_size=24, architecture=architecture, seed=2)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.4)
    plain = PlainDrafter(drafter.config, drafter.state_dict(), head.embedding, head.lm_head)
    tokens = torch.randint(0, VOCAB, (9,))
    features = torch.randn(9, drafter.config.feature_width)
    rows = torch.arange(9)
    with torch.no_grad():
        mixed, residual = drafter.mix(head.embed(tokens, torch.float32), drafter.start(features))
        text = drafter.keys_values(mixed, rows)
        read, state = drafter.rows(mixed, residual, rows, text, rows)
        probs = drafter.logits(read, head.lm_head).softmax(-1)
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i in range(9):
            want, hidden, kv = plain.row(int(tokens[i]), features[i], i, before)
            before.append(kv)
            torch.testing.assert_close(probs[i], want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(state[i], hidden, rtol=1e-4, atol=1e-4)


def test_read_target_says_which_key_is_missing(tmp_path: Path) -> None:
    folder = target_folder(tmp_path / "t")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    with pytest.raises(AuroraError, match="lacks 'vocab_size'"):
        read_target(folder)
