"""The demo's model: converted once, kept, made again when damaged, and right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aurora_sgl import compat
from aurora_sgl.demo import model as demo_model_module
from aurora_sgl.demo.model import (
    MARKER,
    demo_model,
    gguf_file,
    is_converted,
    without_interleaving,
)
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_file

compat.install()

pytestmark = pytest.mark.slow  # converts a model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    demo_model(home, quiet=True)
    return home


def test_the_folder_is_converted_once_and_then_kept(home: Path) -> None:
    folder = demo_model(home, quiet=True)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert demo_model(home, quiet=True) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_transformers_reads_the_same_weights_out_of_the_gguf_file(home: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(demo_model(home), dtype=torch.bfloat16)
    source = gguf_file()
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def test_the_model_answers_a_question_and_stops(home: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_model(home)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    said = answer[prompt["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(said)
    assert said[-1] == tokenizer.eos_token_id


def test_chat_turns_end_with_the_token_that_ends_an_answer(home: Path) -> None:
    from transformers import AutoTokenizer

    folder = demo_model(home)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2


def test_text_comes_back_from_its_tokens_unchanged(home: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model(home))
    for text in (
        "  def f(x):\n\treturn x + 12345\n",
        "caf\u00e9 \u4f60\u597d \u2581 !? .,",
        "2026",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("12345")["input_ids"]) == 5, "SmolLM splits numbers into digits"


def test_a_damaged_folder_is_seen_and_converted_again(home: Path) -> None:
    folder = demo_model(home, quiet=True)
    digest = sha256_file(gguf_file())
    assert is_converted(folder, digest)
    assert not is_converted(folder, "0" * 64), "made from another GGUF file"
    marker = (folder / MARKER).read_text()
    (folder / MARKER).unlink()
    assert not is_converted(folder, digest)
    (folder / MARKER).write_text(marker)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert not is_converted(folder, digest)
    assert demo_model(home, quiet=True) == folder
    assert is_converted(folder, digest)
    assert (folder / "model.safetensors").stat().st_size > 200_000_000


def test_a_missing_package_and_a_full_disk_are_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model_module, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(AuroraError, match="MB free"):
        demo_model(tmp_path, quiet=True)
    monkeypatch.setattr(demo_model_module, "GGUF_PACKAGE", "no_such_package")
    with pytest.raises(AuroraError, match="pip install"):
        demo_model(tmp_path, quiet=True)
    assert list((tmp_path / "models").iterdir()) == []


def test_undoing_the_interleaving_puts_rotary_halves_back_in_order() -> None:
    import torch

    heads, half, hidden = 3, 4, 2
    rows = torch.arange(heads * 2 * half * hidden).reshape(heads * 2 * half, hidden)
    interleaved = (
        rows.reshape(heads, 2, half, hidden).transpose(1, 2).reshape(heads * 2 * half, hidden)
    )
    assert torch.equal(without_interleaving(interleaved, heads), rows)
