"""An untrained drafter for a target: the right shape, random weights, a first draft vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from aurora_sgl.drafter import architectures, vocabulary
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetInfo, read_target

#: Standard deviation of the random weights: Llama's own initializer_range.
_SPREAD = 0.02


def make(
    target: Path,
    *,
    texts: Iterable[str] = (),
    counts: Mapping[int, int] | None = None,
    draft_vocab_size: int = 8192,
    architecture: str = architectures.DEFAULT,
    seed: int = 0,
    model: str = "",
    revision: str = "",
) -> Drafter:
    """An untrained drafter (float32) for the target in a Hugging Face folder.

    The draft vocabulary is the most frequent tokens of ``texts`` under the target's tokenizer, or
    of ``counts`` (token id to count). Raises ``AuroraError`` for a target that is not of the Llama
    family, has too few layers, or has no tokenizer when texts are given.
    """
    info = read_target(target, model=model, revision=revision)
    config = shape_for(info, draft_vocab_size=draft_vocab_size, architecture=architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = architectures.build(config)
        _initialise(drafter)
    if drafter.has_draft_vocabulary:
        texts = list(texts)
        if counts is None:
            counts = vocabulary.count_tokens(target, texts) if texts else {}
        always = sorted(vocabulary.stop_tokens(target))
        ids = vocabulary.choose(counts, draft_vocab_size, info.vocab_size, always=always)
        drafter.d2t, drafter.t2d = vocabulary.maps(ids, info.vocab_size)
    return drafter


def shape_for(
    info: TargetInfo, *, draft_vocab_size: int = 8192, architecture: str = architectures.DEFAULT
) -> DrafterConfig:
    """A drafter as wide as one layer of the target, with a plain rope over the same positions."""
    raw = info.raw
    heads = int(raw["num_attention_heads"])
    rope = raw.get("rope_parameters") or {}
    return DrafterConfig(
        architecture=architecture,
        hidden_size=info.hidden_size,
        intermediate_size=int(raw["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or info.hidden_size // heads),
        vocab_size=info.vocab_size,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        max_positions=int(raw.get("max_position_embeddings", 2048)),
        target_model=info.model,
        target_revision=info.revision,
        **architectures.named(architecture).fields_for(info, draft_vocab_size),
    )


def _initialise(drafter: Drafter) -> None:
    for module in drafter.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=_SPREAD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
