"""What stops a server before it starts says in one line what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_sgl.config import Settings
from aurora_sgl.drafter import checkpoint, hub, scratch
from aurora_sgl.engine.flags import server_flags, value_of
from aurora_sgl.errors import AuroraError
from aurora_sgl.processes.server import free_port
from aurora_sgl.serving import plan


def target_folder(folder: Path, hidden: int = 32, vocabulary: int = 96) -> Path:
    """A small Llama as far as ``plan`` looks at it."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return target_folder(tmp_path / "target")


@pytest.fixture
def drafter(tmp_path: Path, target: Path) -> Path:
    made = scratch.make(target, counts={n: 96 - n for n in range(96)}, draft_vocab_size=48)
    return checkpoint.save(made, tmp_path / "drafter")


def flags(*more: str) -> list[str]:
    return ["--port", str(free_port()), "--device", "cpu", *more]


def refusal(tmp_path: Path, model: Path, drafter: Path | str | None, *more: str, **kw) -> str:
    """The one line that ``plan`` refuses with."""
    settings = Settings(home=tmp_path / "home", **kw)
    with pytest.raises(AuroraError) as refused:
        plan(str(model), str(drafter) if drafter else None, flags(*more), settings)
    line = str(refused.value)
    assert "\n" not in line
    return line


def test_a_plan_names_the_drafter_and_the_cpu_kernels(
    tmp_path: Path, target: Path, drafter: Path
) -> None:
    made = plan(str(target), str(drafter), flags(), Settings(home=tmp_path / "home"))
    assert value_of(made.flags, "--speculative-draft-model-path") == str(drafter)
    assert value_of(made.flags, "--speculative-algorithm") == "EAGLE3"
    assert value_of(made.flags, "--decode-attention-backend") == "intel_amx"
    assert made.environment["AURORA_CPU"] == "1"


def test_what_the_user_gives_is_not_overridden() -> None:
    given = ["--dtype", "float32", "--speculative-num-steps=1", "--prefill-attention-backend", "x"]
    made = server_flags("m", "d", "EAGLE3", given, on_cpu=True)
    assert value_of(made, "--dtype") == "float32"
    assert value_of(made, "--prefill-attention-backend") == "x"
    assert value_of(made, "--speculative-num-steps") == "1"
    assert value_of(made, "--speculative-eagle-topk") is None


def test_an_unknown_model_folder_is_named(tmp_path: Path) -> None:
    assert "no model at" in refusal(tmp_path, tmp_path / "nothing", None)


def test_an_unknown_drafter_folder_is_named(tmp_path: Path, target: Path) -> None:
    assert "no drafter at" in refusal(tmp_path, target, tmp_path / "nothing")


def test_a_drafter_of_another_target_is_refused(tmp_path: Path, drafter: Path) -> None:
    other = target_folder(tmp_path / "other", hidden=64)
    line = refusal(tmp_path, other, drafter)
    assert "cannot serve" in line and "hidden" in line


@pytest.mark.parametrize("damage", ["truncated", "not finite"])
def test_damaged_weights_are_refused(
    tmp_path: Path, target: Path, drafter: Path, damage: str
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(drafter, bad)
    weights = bad / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    else:
        tensors = load_file(weights)
        next(t for t in tensors.values() if t.is_floating_point()).view(-1)[0] = torch.nan
        save_file(tensors, weights, {"format": "pt"})
    line = refusal(tmp_path, target, bad)
    assert ("cut short" in line) if damage == "truncated" else ("finite" in line)


def test_a_port_in_use_is_named(tmp_path: Path, target: Path, drafter: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        settings = Settings(home=tmp_path / "home")
        with pytest.raises(AuroraError, match=f"port {port} .* in use: choose another"):
            plan(str(target), str(drafter), ["--port", port, "--device", "cpu"], settings)


def test_a_data_folder_that_cannot_be_written_is_named(
    tmp_path: Path, target: Path, drafter: Path
) -> None:
    (tmp_path / "home").write_text("a file")
    assert str(tmp_path / "home") in refusal(tmp_path, target, drafter)


def test_a_store_that_is_out_of_reach_is_named_without_its_password(
    tmp_path: Path, target: Path, drafter: Path
) -> None:
    url = f"postgresql://someone:hush@127.0.0.1:{free_port()}/aurora"
    line = refusal(tmp_path, target, drafter, database_url=url)
    assert "127.0.0.1" in line and "hush" not in line


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which can't be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def into_cache(cache: Path, name: str, source: Path, *, weights: bool = True) -> Path:
    """As huggingface_hub lays it out: blobs, and links to them by revision. The snapshot."""
    commit = "0" * 40
    base = cache / f"models--{name.replace('/', '--')}"
    snapshot = base / "snapshots" / commit
    for folder in (snapshot, base / "refs", base / "blobs"):
        folder.mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    files = sorted(path for path in source.iterdir() if path.is_file())
    for number, file in enumerate(files):
        shutil.copyfile(file, base / "blobs" / str(number))
        (snapshot / file.name).symlink_to(base / "blobs" / str(number))
    if weights and not (source / checkpoint.WEIGHTS).exists():
        (snapshot / checkpoint.WEIGHTS).write_bytes(b"")  # nobody reads those of the target here
    return snapshot


def test_names_on_the_hub_stand_for_what_lies_in_its_cache(
    tmp_path: Path, target: Path, drafter: Path, offline: Path
) -> None:
    into_cache(offline, "org/target", target)
    snapshot = into_cache(offline, "org/drafter", drafter)
    ready = plan("org/target", "org/drafter", flags(), Settings(home=tmp_path / "home"))
    assert value_of(ready.flags, "--model-path") == "org/target", "as SGLang, store and clients say"
    assert value_of(ready.flags, "--speculative-draft-model-path") == str(snapshot)


@pytest.mark.parametrize("what", ["model", "drafter"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_name_on_the_hub_that_is_not_in_the_cache_is_refused_with_what_to_do(
    tmp_path: Path, target: Path, offline: Path, what: str, begun: bool
) -> None:
    if begun:  # a download that ended early, or fetched the tokenizer alone
        into_cache(offline, "org/name", target, weights=False)
    places = ("org/name", None) if what == "model" else (str(target), "org/name")
    line = refusal(tmp_path, *places)  # type: ignore[arg-type]
    assert f"the {what} org/name is neither a folder nor in this machine's Hugging Face" in line
    assert "HF_HUB_OFFLINE is set" in line and "hf download org/name" in line


def test_a_folder_comes_before_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    target_folder(tmp_path / "org" / "name")
    assert hub.local("org/name") == hub.fetch("org/name", "model") == Path("org/name")
    assert not hub.is_name("/org/name") and not hub.is_name("./name") and not hub.is_name("a/b/c")


def test_acceptance_thresholds_that_are_not_lossless_are_refused(
    tmp_path: Path, target: Path, drafter: Path
) -> None:
    line = refusal(tmp_path, target, drafter, "--speculative-accept-threshold-acc", "0.9")
    assert "leave it at 1" in line
