"""EAGLE3: three layers of the target fused, and a head of its own over a draft vocabulary.

SGLang 0.5.21, models/llama_eagle3.py. Source: EAGLE-3, arXiv 2503.01840.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from aurora_sgl.drafter import vocabulary
from aurora_sgl.drafter.architectures.one_layer import DecoderLayer, OneLayerDrafter, RMSNorm
from aurora_sgl.drafter.attention.states import wide
from aurora_sgl.drafter.config import DrafterConfig, draft_vocab_size
from aurora_sgl.drafter.json_fields import mapping, wrong
from aurora_sgl.drafter.target import TargetInfo
from aurora_sgl.errors import AuroraError

EAGLE3 = "LlamaForCausalLMEagle3"
_AUX = "eagle_aux_hidden_state_layer_ids"
_NOT_NAMED = (-1, -1, -1)  # SGLang takes its default for the target
_MOST_AUX, _MOST_LAYERS = 64, 10_000


def aux_layers_of(num_layers: int) -> tuple[int, int, int]:
    """The three layers whose *input* the target hands to an EAGLE3 drafter.

    These are SGLang's own default (``set_eagle3_layers_to_capture``, 0.5.21). Below seven layers
    that default names a layer twice, so three distinct ones are taken instead.
    Raises ``AuroraError`` for a target of fewer than four layers.
    """
    if num_layers < 4:
        raise AuroraError(f"EAGLE3 needs a target of at least 4 layers, this one has {num_layers}")
    if num_layers < 7:
        return (1, num_layers // 2, num_layers - 1)
    return (2, num_layers // 2, num_layers - 3)


class Eagle3Layer(DecoderLayer):
    """Takes embedding and hidden state side by side, each with a norm of its own."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config, 2 * config.hidden_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Eagle3(OneLayerDrafter):
    architecture = EAGLE3
    algorithm = "EAGLE3"
    has_own_head = True
    has_draft_vocabulary = True
    variants = (*OneLayerDrafter.variants, "bias")  # of fc, whose tensor ours does not have

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        assert config.aux_layers
        width = config.hidden_size
        self.fc = nn.Linear(config.feature_width, width, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @classmethod
    def fields_from_json(cls, raw: Mapping[str, Any], target_layers: int) -> dict[str, Any]:
        return {
            "draft_vocab_size": draft_vocab_size(raw),
            "aux_layers": _aux_layers(raw, target_layers),
        }

    @classmethod
    def fields_to_json(cls, config: DrafterConfig) -> dict[str, Any]:
        """SGLang adds one to ``eagle_aux_hidden_state_layer_ids``, so they are written less one;
        those that were not named stay so."""
        layers = [layer - 1 for layer in config.aux_layers]
        named = {} if config.aux_layers == _NOT_NAMED else {_AUX: layers}
        return {
            "draft_vocab_size": config.draft_vocab_size,
            "num_aux_hidden_states": len(layers),
            "eagle_config": {"use_aux_hidden_state": True, **named},
        }

    @classmethod
    def fields_for(cls, target: TargetInfo, draft_vocab_size: int) -> dict[str, Any]:
        return {
            "draft_vocab_size": min(draft_vocab_size, target.vocab_size),
            "aux_layers": aux_layers_of(target.num_layers),
        }

    @classmethod
    def target_problems(cls, config: DrafterConfig, target: TargetInfo) -> list[str]:
        if max(config.aux_layers) < target.num_layers:
            return []
        return [f"captures layer {max(config.aux_layers)} of {target.num_layers}"]

    @classmethod
    def features(cls, aux: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return aux

    @classmethod
    def parameter_name(cls, name: str) -> str | None:
        if "embed_tokens" in name:
            return None
        layer = "layers.0."
        return "midlayer." + name.removeprefix(layer) if name.startswith(layer) else name

    @classmethod
    def has_written(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return "fc.weight" in shapes and "layers.0.hidden_norm.weight" in shapes

    @classmethod
    def complete(
        cls, tensors: dict[str, torch.Tensor], config: DrafterConfig
    ) -> dict[str, torch.Tensor]:
        """``t2d`` follows from ``d2t``; a drafter of the whole vocabulary may have neither."""
        return vocabulary.complete(tensors, config.draft_vocab_size, config.vocab_size)

    @property
    def layer(self) -> Eagle3Layer:
        return self.midlayer

    def start(self, features: torch.Tensor) -> torch.Tensor:
        fused: torch.Tensor = self.fc(features)
        return fused

    def mix(self, embeds: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.midlayer
        both = (layer.input_layernorm(embeds), layer.hidden_norm(hidden))
        return torch.cat(both, dim=-1), hidden

    def read(self, out: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The head reads the normed state, the next drafted row the plain one."""
        return self.norm.after_add(out, residual)

    def logits(self, read: torch.Tensor, lm_head: torch.Tensor | None = None) -> torch.Tensor:
        scores: torch.Tensor = self.lm_head(read)
        return wide(scores)


def _aux_layers(raw: Mapping[str, Any], target_layers: int) -> tuple[int, ...]:
    ids = mapping(raw, "eagle_config").get(_AUX)
    if ids:
        if not isinstance(ids, list) or len(ids) > _MOST_AUX or not all(map(_is_layer, ids)):
            raise wrong(_AUX, ids, "a list of the target's layers")
        return tuple(layer + 1 for layer in ids)
    if target_layers:
        return aux_layers_of(target_layers)
    return _NOT_NAMED


def _is_layer(number: object) -> bool:
    return type(number) is int and -1 <= number < _MOST_LAYERS
