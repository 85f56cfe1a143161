"""Cases "Checkpoints": drafters as others publish them are read, kept and served as trained."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aurora_sgl.cli import app
from aurora_sgl.config import Settings
from aurora_sgl.drafter import architectures, checkpoint, served, unpickle, weights
from aurora_sgl.drafter.convert import convert, environment
from aurora_sgl.drafter.target import TargetHead, read_target
from aurora_sgl.engine import unknown
from aurora_sgl.engine.flags import value_of
from aurora_sgl.errors import AuroraError
from aurora_sgl.processes.server import free_port
from aurora_sgl.serving import ServePlan, plan
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from tests.support import published
from tests.support.drafter_cases import HIDDEN, RECIPE, VOCAB, requests, target_folder

EAGLE3, EAGLE = "LlamaForCausalLMEagle3", "LlamaForCausalLMEagle"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return target_folder(tmp_path / "target")


def serve(tmp_path: Path, target: Path, drafter: Path, *more: str) -> ServePlan:
    flags = ["--port", str(free_port()), "--device", "cpu", *more]
    return plan(str(target), str(drafter), flags, Settings(home=tmp_path / "home"))


def served_folder(
    tmp_path: Path, folder: Path, length: int = 128
) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    config = architectures.read_config(folder, target_layers=8)
    ready = served.folder_for(folder, config, length, tmp_path / "home")
    return ready, json.loads((ready / "config.json").read_text()), weights.read_tensors(ready)


@pytest.mark.parametrize("form", ["one", "shards"])
@pytest.mark.parametrize("make", published.MAKERS, ids=lambda one: one.__name__)
def test_a_published_folder_is_served_as_it_was_trained(
    tmp_path: Path, target: Path, make: published.Maker, form: str
) -> None:
    folder = make(tmp_path / "drafter", form)
    assert checkpoint.validate(folder, read_target(target)) == []
    config = architectures.read_config(folder, target_layers=8)
    ready, words, tensors = served_folder(tmp_path, folder)
    is_first = "eagle1" in make.__name__
    assert words["architectures"] == [EAGLE if is_first else EAGLE3]
    assert not words.get("bias"), "SGLang would read it as one of the attention"
    assert words["max_position_embeddings"] == 128, "SGLang ends where it is below the target's"
    assert is_first or words["draft_vocab_size"] == config.draft_vocab_size
    given = weights.read_tensors(folder)
    if is_first:
        given.pop("lm_head.weight", None)  # the target's
    assert all(torch.equal(tensors[name], tensor) for name, tensor in given.items())
    assert tensors.keys() - given.keys() <= {"fc.bias"}
    assert not is_first or tensors["fc.bias"].shape == (HIDDEN,)
    assert served_folder(tmp_path, folder)[0] == ready, "the copy is made once"
    assert served_folder(tmp_path, ready)[0] == ready, "and is served as it is"
    assert checkpoint.validate(ready, read_target(target)) == []


def test_serve_starts_sglang_with_the_copy(tmp_path: Path, target: Path) -> None:
    for make, algorithm in (
        (published.eagle3_of_its_authors, "EAGLE3"),
        (published.eagle1_of_its_authors, "EAGLE"),
    ):
        ready = serve(tmp_path, target, make(tmp_path / algorithm, "one"))
        assert value_of(ready.flags, "--speculative-algorithm") == algorithm
        path = value_of(ready.flags, "--speculative-draft-model-path")
        assert path == str(ready.drafter) and ready.drafter.name.startswith("served-")
        assert f"served from {path}" in ready.note
    folder = published.eagle3_for_sglang(tmp_path / "drafter")
    assert serve(tmp_path, target, folder, "--context-length", "64").drafter == folder


@pytest.mark.parametrize("make", [published.eagle3_of_its_authors, published.eagle1_of_its_authors])
def test_a_pickle_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, target: Path, make: published.Maker
) -> None:
    folder = make(tmp_path / "a drafter", "pickle")
    (problem,) = checkpoint.validate(folder)
    assert f"aurora-sgl versions convert '{folder}' NEW_FOLDER" in problem and "\n" not in problem
    with pytest.raises(AuroraError, match="aurora-sgl versions convert"):
        checkpoint.load(folder)


@pytest.mark.process
def test_the_command_converts_a_pickle_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = published.eagle3_of_its_authors(tmp_path / "drafter", "pickle")
    done = CliRunner().invoke(app, ["versions", "convert", str(folder), str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    into = tmp_path / "new"
    assert sorted(path.name for path in into.iterdir()) == ["config.json", "model.safetensors"]
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert {name: t.dtype for name, t in load_file(into / "model.safetensors").items()} == {
        name: t.dtype for name, t in state.items()
    }
    assert served_folder(tmp_path, into)[1]["architectures"] == [EAGLE3]
    with pytest.raises(AuroraError, match="is not empty"):
        convert(folder, into)
    with pytest.raises(AuroraError, match="nothing to convert"):
        convert(into, tmp_path / "third")


def test_the_process_has_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_DATABASE_URL", "postgresql://u:secret@h/d")
    monkeypatch.setenv("HF_TOKEN", "secret")
    given = environment("/scratch")
    assert "secret" not in "".join(given.values()) and given["HOME"] == "/scratch"


class Code:
    """What a pickle can hold: a call, with the place where it leaves its mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.mark,))


def odd_pickles(mark: Path) -> dict[str, Any]:
    return {
        "code": {"fc.weight": Code(mark)},
        "code beside": {"fc.weight": torch.zeros(2), "more": Code(mark)},
        "list": [torch.zeros(2)],
        "numbers": {"fc.weight": 3},
        "names": {3: torch.zeros(2)},
        "nested": {"state": {"fc.weight": torch.zeros(2)}},
    }


@pytest.mark.parametrize("name", [*odd_pickles(Path()), "bytes", "cut", "plain pickle"])
def test_a_pickle_of_more_than_tensors_is_one_line_and_nothing_in_it_runs(
    tmp_path: Path, name: str
) -> None:
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    if name == "bytes":
        path.write_bytes(b"\x80\x05" + bytes(200))
    elif name == "plain pickle":
        path.write_bytes(pickle.dumps({"fc.weight": Code(mark)}))
    else:
        torch.save(odd_pickles(mark).get(name, {"fc.weight": torch.zeros(99)}), path)
    if name == "cut":
        path.write_bytes(path.read_bytes()[:-70])
    with pytest.raises(AuroraError) as refused:
        unpickle.read(path)
    assert "\n" not in str(refused.value) and not mark.exists()


@pytest.mark.process
def test_a_pickle_that_asks_for_all_memory_ends_its_own_process_alone(tmp_path: Path) -> None:
    folder = published.eagle3_of_its_authors(tmp_path / "drafter", "pickle")
    torch.save({"fc.weight": torch.zeros(1).expand(1 << 38)}, folder / "pytorch_model.bin")
    with pytest.raises(AuroraError, match="can't be converted"):
        convert(folder, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"], "nothing half-written"


def test_a_drafter_of_the_whole_vocabulary_stays_one(tmp_path: Path, target: Path) -> None:
    """Case "full vocabulary, no d2t"."""
    folder = published.eagle3_of_all_tokens(tmp_path / "drafter")
    tensors = weights.read_tensors(folder)
    assert checkpoint.vocab_sha256(tensors) == checkpoint.vocab_sha256({})
    drafter = checkpoint.load(folder)
    assert drafter.target_ids.tolist() == list(range(VOCAB))
    head = TargetHead.load(target)
    settings = TrainSettings(**{**RECIPE, "passes": 1})
    trained = train(drafter, requests(head, 2), head, settings).drafter
    kept = weights.read_tensors(checkpoint.save(trained, tmp_path / "kept", dtype=torch.float16))
    assert kept.keys() == tensors.keys(), "SGLang looks tokens up in a map where there is one"
    same = checkpoint.save(checkpoint.load(folder), tmp_path / "same", dtype=torch.float16)
    assert checkpoint.content_sha256(weights.read_tensors(same)) == checkpoint.content_sha256(
        tensors
    )
    assert checkpoint.validate(tmp_path / "kept", read_target(target)) == []


def test_a_part_of_the_vocabulary_needs_its_map(tmp_path: Path) -> None:
    folder = published.eagle3_for_sglang(tmp_path / "drafter")
    tensors = weights.read_tensors(folder)
    del tensors["d2t"]
    save_file(tensors, folder / "model.safetensors")
    assert "tensor d2t is missing" in checkpoint.validate(folder)


@pytest.mark.parametrize("place", ["", "eagle_config"])
@pytest.mark.parametrize(
    "name", ["norm_before_residual", "norm_before_fc", "fc_norm", "use_aux_norm", "norm_output"]
)
def test_arithmetic_that_is_not_ours_is_refused_in_one_line(
    tmp_path: Path, name: str, place: str
) -> None:
    folder = published.eagle3_for_sglang(tmp_path / "drafter")
    raw = json.loads((folder / "config.json").read_text())
    change = {place: {name: True}} if place else {name: True}
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    assert checkpoint.validate(folder) == [f"drafters with {name} are not supported"]
    (folder / "config.json").write_text(json.dumps({**raw, name: False}))
    assert checkpoint.validate(folder) == []


def test_eagle_1_has_the_bias_that_its_file_has_and_none_otherwise(tmp_path: Path) -> None:
    """Case "EAGLE-1 with bias: true and fc.bias"."""
    with_it = checkpoint.load(published.eagle1_with_bias(tmp_path / "with"))
    without = checkpoint.load(published.eagle1_of_its_authors(tmp_path / "without", "one"))
    assert with_it.get_parameter("fc.bias").abs().sum() > 0
    assert without.get_parameter("fc.bias").abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 128),
        ({"max_position_embeddings": 32}, 128),
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_sequence_length": 16}, 128),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 1.5}}, 86),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            128,
        ),
    ],
)
def test_a_drafter_of_fewer_positions_is_served_as_far_as_the_target(
    tmp_path: Path, change: dict[str, Any], length: int
) -> None:
    """Case "max_position_embeddings 2048 on a longer target": SGLang would end at its start."""
    folder = published.eagle3_for_sglang(tmp_path / "drafter")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    _, words, _ = served_folder(tmp_path, folder)
    assert words["max_position_embeddings"] == length and served.context_length(words) >= 128
    before, after = (architectures.from_json(one) for one in (raw | change, words))
    assert before.rope == after.rope, "positions go further, and each stays where it is"
    assert served.context_length(served_folder(tmp_path, folder, 512)[1]) >= 512


def test_a_plain_sglang_that_reads_a_checkpoint_otherwise_has_an_unknown_drafter(
    tmp_path: Path,
) -> None:
    """What no ``aurora-sgl serve`` made a copy of must not be learnt from as if it were that."""
    for make in published.MAKERS:
        reason = unknown._is_not_ours(make(tmp_path / make.__name__, "one"))
        served_as_is = make in (
            published.eagle1_for_sglang,
            published.eagle3_for_sglang,
            published.eagle3_of_specforge,
            published.eagle3_of_all_tokens,
        )
        assert (reason == "") is served_as_is, make.__name__
        assert served_as_is or "aurora-sgl serve" in reason
