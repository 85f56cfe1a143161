"""The drafters that SGLang serves, written so that a row can be run anywhere on the way.

Row ``i`` of a text takes the features of token ``i`` and the embedding of token ``i + 1``, stands
at rotary position ``i`` and predicts token ``i + 2``. A drafted row takes the drafter's own hidden
state in place of the features. Keys and values depend on a row's input alone (there is one layer),
so :meth:`Drafter.keys_values` runs over the whole text and :meth:`Drafter.rows` only over the
rows whose output is wanted.

Parameters carry the names of the checkpoints that SGLang 0.5.21 loads (models/llama_eagle3.py,
models/llama_eagle.py). The embedding, and for EAGLE the lm_head, are the target's and not here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from aurora_sgl.drafter.attention import Seen, attend
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.rope import inverse_frequencies, rotate


class RMSNorm(nn.Module):
    """Root mean square norm in float32, rounded after the weight as SGLang does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x.float(), x.dtype)

    def after_add(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm of the sum, and the sum. The norm sees the sum before it is rounded."""
        wide = x.float() + residual.float()
        return self._norm(wide, residual.dtype), wide.to(residual.dtype)

    def _norm(self, wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(dtype)


class Attention(nn.Module):
    def __init__(self, config: DrafterConfig, width_in: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width_in, q_width, bias=False)
        self.k_proj = nn.Linear(width_in, kv_width, bias=False)
        self.v_proj = nn.Linear(width_in, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(*projected.shape[:-1], -1, self.head_dim)


class MLP(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, 2 * width if config.is_eagle3 else width)
        self.mlp = MLP(config)
        self.post_attention_layernorm = RMSNorm(width, eps)
        if config.is_eagle3:
            self.input_layernorm = RMSNorm(width, eps)
            self.hidden_norm = RMSNorm(width, eps)


class Drafter(nn.Module):
    """An EAGLE or EAGLE3 drafter of one layer."""

    d2t: torch.Tensor  # [draft_vocab] int64: target id less draft id
    t2d: torch.Tensor  # [vocab] bool: whether a target id is in the draft vocabulary

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.rms_norm_eps
        if config.is_eagle3:
            self.fc = nn.Linear(config.feature_width, width, bias=False)
            self.midlayer = Layer(config)
            self.norm = RMSNorm(width, eps)
            self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        else:
            self.fc = nn.Linear(2 * width, width)
            self.layers = nn.ModuleList([Layer(config)])
        self.frequencies = inverse_frequencies(config)

    @property
    def layer(self) -> Layer:
        layer = self.midlayer if self.config.is_eagle3 else self.layers[0]
        assert isinstance(layer, Layer)
        return layer

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def target_ids(self) -> torch.Tensor:  # [draft_vocab] int64
        """Target token id of each draft token id."""
        if not self.config.is_eagle3:
            return torch.arange(self.config.vocab_size, device=self.device)
        return self.d2t + torch.arange(self.config.draft_vocab_size, device=self.d2t.device)

    def start(self, features: torch.Tensor) -> torch.Tensor:  # [rows, feature_width] -> [rows, H]
        """The target's features as a hidden state: EAGLE3 fuses three layers, EAGLE takes one."""
        if not self.config.is_eagle3:
            return features
        fused: torch.Tensor = self.fc(features)
        return fused

    def mix(self, embeds: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of the attention and the residual beside it, from a row's two inputs [rows, H]."""
        if not self.config.is_eagle3:
            mixed = self.fc(torch.cat((embeds, hidden), dim=-1))
            return mixed, mixed
        layer = self.layer
        both = (layer.input_layernorm(embeds), layer.hidden_norm(hidden))
        return torch.cat(both, dim=-1), hidden

    def keys_values(
        self, mixed: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [rows, kv_heads, head_dim] twice
        attention = self.layer.self_attn
        key = rotate(attention.heads(attention.k_proj(mixed)), positions, self._frequencies())
        return key, attention.heads(attention.v_proj(mixed))

    def rows(
        self,
        mixed: torch.Tensor,  # [rows, width in]
        residual: torch.Tensor,  # [rows, H]
        positions: torch.Tensor,  # [rows]
        text: tuple[torch.Tensor, torch.Tensor],  # keys and values of the text rows
        last_row: torch.Tensor | Seen,  # [rows]: text rows 0..last_row are seen
        own: tuple[torch.Tensor, ...] | None = None,  # attend's own_key, own_value and own_seen
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [rows, H] twice
        """What the head reads, and what the next drafted row takes for its hidden state.

        EAGLE3 norms the one and not the other; for EAGLE they are the same.
        """
        layer = self.layer
        attention = layer.self_attn
        query = rotate(attention.heads(attention.q_proj(mixed)), positions, self._frequencies())
        seen = attend(query, *text, last_row, *(own or (None, None)))
        normed, residual = layer.post_attention_layernorm.after_add(
            attention.o_proj(seen.flatten(-2)), residual
        )
        out = layer.mlp(normed)
        if self.config.is_eagle3:
            return self.norm.after_add(out, residual)
        return out + residual, out + residual

    def logits(
        self, read: torch.Tensor, lm_head: torch.Tensor | None = None
    ) -> torch.Tensor:  # [rows, draft_vocab] float32
        """Scores of the draft vocabulary. EAGLE needs the target's ``lm_head`` [vocab, H]."""
        if self.config.is_eagle3:
            scores: torch.Tensor = self.lm_head(read)
            return scores.float()
        assert lm_head is not None, "EAGLE shares the target's lm_head"
        return F.linear(read, lm_head.to(read.dtype)).float()

    def _frequencies(self) -> torch.Tensor:
        self.frequencies = self.frequencies.to(self.device)
        return self.frequencies
