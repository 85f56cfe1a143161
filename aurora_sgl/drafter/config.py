"""The shape of a drafter, and what every drafter's Hugging Face ``config.json`` has in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aurora_sgl.drafter import rope_json
from aurora_sgl.drafter.json_fields import mapping, number, whole
from aurora_sgl.errors import AuroraError

#: More than any model has; a number beyond is a damaged file, and would ask for all memory.
_MOST_TOKENS, _MOST_POSITIONS = 1 << 24, 1 << 40


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a drafter; ``architecture`` says which class of ``drafter.architectures`` it is."""

    architecture: str
    hidden_size: int  # the target's
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int  # vocab_size without a draft vocabulary
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    rope: Mapping[str, Any] | None = None  # parameters of a scaled rope, as in rope_parameters
    aux_layers: tuple[int, ...] = ()  # layers of the target whose input is captured for it
    target_model: str = ""
    target_revision: str = ""

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0
        assert 0 < self.draft_vocab_size <= self.vocab_size

    @property
    def feature_width(self) -> int:
        """Width of the target's features that one row takes: of the captured layers side by side,
        or of the last hidden state."""
        return self.hidden_size * max(1, len(self.aux_layers))


def config_json(config: DrafterConfig) -> dict[str, Any]:
    """The keys of ``config.json`` that every architecture writes.

    ``tie_word_embeddings`` must be false, or SGLang takes the target's embedding as lm_head.
    """
    rope = {"rope_type": "default", **(config.rope or {}), "rope_theta": config.rope_theta}
    return {
        "architectures": [config.architecture],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_positions,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "aurora": {
            "target_model": config.target_model,
            "target_revision": config.target_revision,
        },
    }


def shared_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: fields of :class:`DrafterConfig` from those keys, less the architecture.

    Raises ``AuroraError`` for a shape that is not supported, ``KeyError`` for a key that is not
    there.
    """
    _refuse_unsupported(raw)
    heads = whole(raw, "num_attention_heads")
    hidden = whole(raw, "hidden_size")
    kv_heads = whole(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise AuroraError(f"the drafter's {heads} heads can't share {kv_heads} heads of KV")
    head_dim = whole(raw, "head_dim", hidden // heads)
    if head_dim % 2:
        raise AuroraError(f"the drafter's head_dim is {head_dim}; rotary positions need pairs")
    rope_theta, rope = rope_json.read(raw)
    aurora = mapping(raw, "aurora")
    return {
        "hidden_size": hidden,
        "intermediate_size": whole(raw, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": whole(raw, "vocab_size", most=_MOST_TOKENS),
        "rms_norm_eps": number(raw, "rms_norm_eps", 1e-6),
        "rope_theta": rope_theta,
        "max_positions": whole(raw, "max_position_embeddings", 2048, most=_MOST_POSITIONS),
        "rope": rope,
        "target_model": str(aurora.get("target_model", "")),
        "target_revision": str(aurora.get("target_revision", "")),
    }


def draft_vocab_size(raw: Mapping[str, Any]) -> int:
    """Of a drafter with a head of its own; without the key it is the target's vocabulary."""
    most = whole(raw, "vocab_size", most=_MOST_TOKENS)
    size = whole(raw, "draft_vocab_size", most, most=_MOST_TOKENS)
    if size > most:
        raise AuroraError(f"the drafter's draft_vocab_size {size} is above its vocab_size {most}")
    return size


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("tie_word_embeddings", True):
        raise AuroraError("the drafter's config.json must say tie_word_embeddings: false")
    if whole(raw, "target_hidden_size", whole(raw, "hidden_size")) != raw["hidden_size"]:
        raise AuroraError("drafters of another hidden size than the target's are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise AuroraError("only drafters with silu activation are supported")
