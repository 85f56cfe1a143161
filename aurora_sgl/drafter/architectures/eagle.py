"""EAGLE: the target's last hidden state and its lm_head, over the whole vocabulary.

SGLang 0.5.21, models/llama_eagle.py. Source: EAGLE, arXiv 2401.15077.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from aurora_sgl.drafter.architectures.one_layer import DecoderLayer, OneLayerDrafter
from aurora_sgl.drafter.attention.states import wide
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.target import TargetInfo

EAGLE = "LlamaForCausalLMEagle"


class Eagle(OneLayerDrafter):
    architecture = EAGLE
    algorithm = "EAGLE"
    has_own_head = False
    has_draft_vocabulary = False

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        assert not config.aux_layers and config.draft_vocab_size == config.vocab_size
        width = config.hidden_size
        self.fc = nn.Linear(2 * width, width)
        self.layers = nn.ModuleList([DecoderLayer(config, width)])

    @classmethod
    def fields_from_json(cls, raw: Mapping[str, Any], target_layers: int) -> dict[str, Any]:
        return {"draft_vocab_size": raw["vocab_size"]}

    @classmethod
    def fields_to_json(cls, config: DrafterConfig) -> dict[str, Any]:
        return {}

    @classmethod
    def fields_for(cls, target: TargetInfo, draft_vocab_size: int) -> dict[str, Any]:
        return {"draft_vocab_size": target.vocab_size}

    @classmethod
    def features(cls, aux: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return last

    @classmethod
    def parameter_name(cls, name: str) -> str | None:
        return None if "embed_tokens" in name or "lm_head" in name else name

    @classmethod
    def has_written(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """The first norm of the layer is left out, of SGLang's class too."""
        norms = ("layers.0.input_layernorm.weight", "layers.0.hidden_norm.weight")
        return "fc.weight" in shapes and not any(name in shapes for name in norms)

    @classmethod
    def left_out(
        cls, tensors: Mapping[str, torch.Tensor], config: DrafterConfig
    ) -> dict[str, torch.Tensor]:
        """``fc.bias`` of drafters that were trained without one (``"bias": false``, as EAGLE's
        for Llama 3): SGLang's layer has one all the same, and starts with whatever PyTorch drew."""
        if "fc.bias" in tensors or "fc.weight" not in tensors:
            return {}
        return {"fc.bias": torch.zeros(config.hidden_size, dtype=tensors["fc.weight"].dtype)}

    @classmethod
    def complete(
        cls, tensors: dict[str, torch.Tensor], config: DrafterConfig
    ) -> dict[str, torch.Tensor]:
        return {**tensors, **cls.left_out(tensors, config)}

    @property
    def layer(self) -> DecoderLayer:
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        return layer

    def start(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def mix(self, embeds: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = self.fc(torch.cat((embeds, hidden), dim=-1))
        return mixed, mixed

    def read(self, out: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The head reads the hidden state as it is: the target's own final norm is learned."""
        return out + residual, out + residual

    def logits(self, read: torch.Tensor, lm_head: torch.Tensor | None = None) -> torch.Tensor:
        assert lm_head is not None, "EAGLE shares the target's lm_head"
        return wide(F.linear(read, lm_head.to(read.dtype)))
