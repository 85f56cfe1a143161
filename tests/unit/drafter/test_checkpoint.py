"""Checkpoints: what SGLang loads, what is refused, and what a hash stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.drafter.architectures import read_config
from aurora_sgl.drafter.architectures.eagle import EAGLE
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3
from aurora_sgl.drafter.target import read_target
from aurora_sgl.errors import AuroraError
from tests.support.drafter_cases import HIDDEN, LAYERS, VOCAB, target_folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return target_folder(tmp_path / "target")


@pytest.fixture
def folder(target: Path, tmp_path: Path) -> Path:
    drafter = scratch.make(target, draft_vocab_size=24, model="tiny")
    return checkpoint.save(drafter, tmp_path / "drafter")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / checkpoint.WEIGHTS
    tensors = {**load_file(str(path)), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, str(path))


def test_an_eagle3_folder_holds_what_sglang_loads_and_no_embedding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [EAGLE3]
    assert config["tie_word_embeddings"] is False
    assert config["draft_vocab_size"] == 24
    # SGLang captures the input of layer id + 1; its default for 8 layers is [2, 4, 5].
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    tensors = load_file(str(folder / checkpoint.WEIGHTS))
    assert tensors["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (HIDDEN, 2 * HIDDEN)
    assert tensors["lm_head.weight"].shape == (24, HIDDEN)
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].shape == (VOCAB,)
    assert not any("embed_tokens" in name for name in tensors)
    assert {t.dtype for n, t in tensors.items() if n not in ("d2t", "t2d")} == {torch.bfloat16}


def test_an_eagle_folder_has_neither_lm_head_nor_vocabulary(target: Path, tmp_path: Path) -> None:
    drafter = scratch.make(target, architecture=EAGLE)
    tensors = load_file(str(checkpoint.save(drafter, tmp_path / "eagle") / checkpoint.WEIGHTS))
    assert {"fc.weight", "fc.bias"} <= tensors.keys()
    assert not {"lm_head.weight", "d2t", "norm.weight"} & tensors.keys()
    assert "layers.0.input_layernorm.weight" not in tensors
    assert checkpoint.validate(tmp_path / "eagle", read_target(target)) == []


def test_loading_gives_back_what_was_saved(folder: Path, target: Path, tmp_path: Path) -> None:
    again = checkpoint.save(checkpoint.load(folder), tmp_path / "again")
    assert read_config(again) == read_config(folder)
    first, second = (checkpoint.read_tensors(f) for f in (folder, again))
    assert checkpoint.content_sha256(first) == checkpoint.content_sha256(second)
    assert checkpoint.vocab_sha256(first) == checkpoint.vocab_sha256(second)
    assert checkpoint.validate(folder, read_target(target)) == []


def test_the_hash_follows_content_and_not_file_order_or_names_in_use(folder: Path) -> None:
    tensors = checkpoint.read_tensors(folder)
    whole = checkpoint.content_sha256(tensors)
    renamed = {n.replace("midlayer.", "model.layers.0."): t for n, t in tensors.items()}
    assert checkpoint.content_sha256(dict(reversed(renamed.items()))) == whole
    with_embedding = {**tensors, "embed_tokens.weight": torch.ones(2)}
    assert checkpoint.content_sha256(with_embedding) == whole
    for name in ("lm_head.weight", "d2t"):
        other = {**tensors, name: tensors[name] + 1}
        assert checkpoint.content_sha256(other) != whole
    wide = {**tensors, "norm.weight": tensors["norm.weight"].float()}
    assert checkpoint.content_sha256(wide) != whole


def test_a_published_checkpoint_with_other_names_and_an_embedding_loads(folder: Path) -> None:
    tensors = load_file(str(folder / checkpoint.WEIGHTS))
    renamed = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items() if n != "t2d"}
    renamed["embed_tokens.weight"] = torch.zeros(VOCAB, HIDDEN)
    save_file(renamed, str(folder / checkpoint.WEIGHTS))
    loaded = checkpoint.load(folder)
    assert torch.equal(loaded.t2d, tensors["t2d"])
    assert "embed_tokens.weight" not in loaded.state_dict()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("norm.weight", None, "norm.weight is missing"),
        ("extra.weight", torch.ones(2), "extra.weight is unknown"),
        ("norm.weight", torch.ones(3), "shape [3], expected [16]"),
        ("norm.weight", torch.full((HIDDEN,), float("nan")), "not finite"),
        ("norm.weight", torch.ones(HIDDEN, dtype=torch.int32), "not a floating-point"),
        ("d2t", torch.full((24,), VOCAB), "outside the target's vocabulary"),
        ("d2t", -torch.arange(24), "twice"),
        ("t2d", torch.zeros(VOCAB, dtype=torch.bool), "disagree"),
    ],
)
def test_validation_names_what_is_wrong(
    folder: Path, name: str, value: torch.Tensor | None, says: str
) -> None:
    rewrite(folder, **{name: value})
    assert any(says in problem for problem in checkpoint.validate(folder))


def test_a_truncated_file_is_one_clear_problem(folder: Path) -> None:
    path = folder / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    (problem,) = checkpoint.validate(folder)
    assert "cut short" in problem
    with pytest.raises(AuroraError, match="cut short"):
        checkpoint.load(folder)


def test_a_drafter_of_another_target_is_refused(folder: Path, tmp_path: Path) -> None:
    wide = target_folder(tmp_path / "wide", hidden_size=32, vocab_size=VOCAB + 1)
    problems = checkpoint.validate(folder, read_target(wide))
    assert any("hidden size 16" in p for p in problems)
    assert any("vocabulary of 40" in p for p in problems)
    shallow = target_folder(tmp_path / "shallow", num_hidden_layers=5)
    assert any("layer 5 of 5" in p for p in checkpoint.validate(folder, read_target(shallow)))
    assert LAYERS > 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "not a drafter"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_hidden_layers": 2}, "one layer"),
        ({"hidden_size": None}, "not supported|lacks"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type yarn"),
        ({"norm_before_fc": True}, "norm_before_fc"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(
    folder: Path, change: dict[str, object], says: str
) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    if config["hidden_size"] is None:
        del config["hidden_size"], config["target_hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AuroraError, match=says):
        read_config(folder)
    assert len(checkpoint.validate(folder)) == 1


def test_saving_replaces_a_folder_whole_and_leaves_nothing_beside_it(
    folder: Path, target: Path
) -> None:
    other = scratch.make(target, draft_vocab_size=24, seed=9)
    (folder / "stale.txt").write_text("old")
    checkpoint.save(other, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", checkpoint.WEIGHTS]
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_a_place_that_cannot_be_written_is_one_clear_error(target: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    drafter = scratch.make(target, draft_vocab_size=24)
    with pytest.raises(AuroraError, match="cannot write"):
        checkpoint.save(drafter, tmp_path / "file" / "drafter")
