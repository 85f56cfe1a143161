"""Random Llama targets of any width, with a real tokenizer: what sizes and ranks cost and break can
be seen with them, what drafts are worth cannot."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
VOCABULARY = 49_152  # the tokenizer's


def make_target(
    folder: Path,
    tokenizer_of: Path,
    *,
    hidden_size: int = 256,
    layers: int = 8,
    heads: int = 8,
    inner: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """A random ``LlamaForCausalLM`` (tied embeddings) whose heads two ranks can share. ``inner``:
    width of its MLPs, by default twice that of its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=inner or 2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
        with torch.no_grad():  # far apart, so that no sum's order decides which logit is largest
            model.model.embed_tokens.weight.mul_(8.0)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_of / name).exists():
            shutil.copy(tokenizer_of / name, folder / name)
    return folder


def greedy_tokens(folder: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What Hugging Face's own greedy decoding in float32 answers, ``tokens`` for each prompt."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    answers = []
    with torch.no_grad():
        for prompt in prompts:
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            answers.append(output[0, len(prompt) :].tolist())
    return answers


def make_drafter(target: Path, answers: list[list[int]], folder: Path, seed: int = 0) -> Path:
    """A random drafter that drafts only tokens of these answers: by chance some are accepted."""
    from aurora_sgl.drafter import checkpoint, scratch

    counts = Counter(token for answer in answers for token in answer)
    drafter = scratch.make(target, counts=counts, draft_vocab_size=32, seed=seed)
    return checkpoint.save(drafter, folder)
