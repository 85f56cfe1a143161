"""Small drafter folders laid out as published ones are: names, keys, files, kinds of numbers.

What differs between them was looked up where they are published: yuhuili's (EAGLE's authors)
name the target's class and come as a pickle; jamesliu1's and those that SpecForge trains name
SGLang's class; EAGLE-1 for Llama 3 has no bias in fc, for Llama 2 it has one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.drafter_cases import HIDDEN, VOCAB

DRAFT_VOCAB, WIDE = 24, 24

#: Keys that all of them have, with the numbers of ``drafter_cases.target_folder``.
COMMON: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": WIDE,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": VOCAB,
}


def decoder(prefix: str, width: int) -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj": (HIDDEN, width),
        "self_attn.k_proj": (HIDDEN // 2, width),
        "self_attn.v_proj": (HIDDEN // 2, width),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (WIDE, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"{prefix}.{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def eagle3_tensors(draft_vocab: int = DRAFT_VOCAB) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    ids = torch.arange(draft_vocab) + (VOCAB - draft_vocab) // 2
    inside = torch.zeros(VOCAB, dtype=torch.bool)
    inside[ids] = True
    layer = "midlayer"
    return {
        "d2t": ids - torch.arange(draft_vocab),
        "t2d": inside,
        "fc.weight": 0.3 * torch.randn(HIDDEN, 3 * HIDDEN),
        **decoder(layer, 2 * HIDDEN),
        f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
        f"{layer}.hidden_norm.weight": torch.ones(HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": 0.3 * torch.randn(draft_vocab, HIDDEN),
    }


def eagle1_tensors(*, bias: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(6)
    fc = {"fc.weight": 0.3 * torch.randn(HIDDEN, 2 * HIDDEN)}
    if bias:
        fc["fc.bias"] = torch.randn(HIDDEN)
    embedding = {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    return {**embedding, **decoder("layers.0", HIDDEN), **fc}


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], *, form: str
) -> Path:
    """``form``: "pickle", "one" (model.safetensors), or "shards" with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **config}, indent=2))
    kind = torch.bfloat16 if config.get("torch_dtype") == "bfloat16" else torch.float16
    state = {n: t.to(kind) if t.is_floating_point() else t for n, t in tensors.items()}
    if form == "pickle":
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "one":
        save_file(state, folder / "model.safetensors")
    else:
        places = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(state)}
        for place in set(places.values()):
            part = {name: tensor for name, tensor in state.items() if places[name] == place}
            save_file(part, folder / place)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def eagle3_of_its_authors(folder: Path, form: str = "pickle") -> Path:
    """yuhuili/EAGLE3-LLaMA3.1-Instruct-8B."""
    config = {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": DRAFT_VOCAB}
    return write(folder, config, eagle3_tensors(), form=form)


def eagle1_of_its_authors(folder: Path, form: str = "pickle") -> Path:
    """yuhuili/EAGLE-LLaMA3-Instruct-8B: no bias, and the target's embedding beside it."""
    config = {"architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0, "bias": False}
    return write(folder, config, eagle1_tensors(bias=False), form=form)


def eagle1_with_bias(folder: Path, form: str = "one") -> Path:
    """yuhuili/EAGLE-llama2-chat-7B and others whose config says so."""
    config = {"architectures": ["LlamaForCausalLM"], "bias": True}
    return write(folder, config, eagle1_tensors(bias=True), form=form)


def eagle1_for_sglang(folder: Path, form: str = "one") -> Path:
    """lmsys/sglang-EAGLE-llama2-chat-7B."""
    config = {"architectures": ["LlamaForCausalLMEagle"]}
    return write(folder, config, eagle1_tensors(bias=True), form=form)


def eagle1_with_head(folder: Path, form: str = "one") -> Path:
    """As BaldEagle writes them: the target's lm_head beside it."""
    config = {"architectures": ["LlamaForCausalLMEagle"]}
    head = {"lm_head.weight": torch.randn(VOCAB, HIDDEN)}
    return write(folder, config, {**eagle1_tensors(bias=True), **head}, form=form)


def eagle3_for_sglang(folder: Path, form: str = "one") -> Path:
    """jamesliu1/sglang-EAGLE3-Llama-3.1-Instruct-8B."""
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": DRAFT_VOCAB,
        "torch_dtype": "bfloat16",
    }
    return write(folder, config, eagle3_tensors(), form=form)


def eagle3_of_specforge(folder: Path, form: str = "one") -> Path:
    """As SpecForge's configs/qwen3-32b-eagle3.json makes them."""
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 4,
        "max_window_layers": 64,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
        "draft_vocab_size": DRAFT_VOCAB,
    }
    return write(folder, config, eagle3_tensors(), form=form)


def eagle3_of_all_tokens(folder: Path, form: str = "one") -> Path:
    """Trained over the target's whole vocabulary: no maps."""
    config = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": VOCAB}
    tensors = eagle3_tensors(VOCAB)
    del tensors["d2t"], tensors["t2d"]
    return write(folder, config, tensors, form=form)


Maker = Callable[..., Path]
MAKERS: tuple[Maker, ...] = (
    eagle3_of_its_authors,
    eagle1_of_its_authors,
    eagle1_with_bias,
    eagle1_for_sglang,
    eagle1_with_head,
    eagle3_for_sglang,
    eagle3_of_specforge,
    eagle3_of_all_tokens,
)
