"""What drafters of one decoder layer share: a row can be run anywhere on the way.

Row ``i`` of a text takes the features of token ``i`` and the embedding of token ``i + 1``, stands
at rotary position ``i`` and predicts token ``i + 2``. A drafted row takes the drafter's own hidden
state in place of the features. Keys and values depend on a row's input alone (there is one layer),
so :meth:`OneLayerDrafter.keys_values` runs over the whole text and :meth:`OneLayerDrafter.rows`
only over the rows whose output is wanted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter import beam
from aurora_sgl.drafter.attention import Seen, attend
from aurora_sgl.drafter.attention.states import wide
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.json_fields import mapping, whole
from aurora_sgl.drafter.model import Draft, Drafter
from aurora_sgl.drafter.packed import DraftedRows, Keep, PackedText
from aurora_sgl.drafter.rope import inverse_frequencies, rotate
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.errors import AuroraError


class RMSNorm(nn.Module):
    """Root mean square norm in float32 (float64 of that), rounded behind the weight as SGLang
    does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(wide(x), x.dtype)

    def after_add(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm of the sum, and the sum. The norm sees the sum before it is rounded."""
        total = wide(x) + wide(residual)
        return self._norm(total, residual.dtype), total.to(residual.dtype)

    def _norm(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * scale * self.weight).to(dtype)


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


class DecoderLayer(nn.Module):
    """Attention and MLP; what stands before the attention is the architecture's own."""

    def __init__(self, config: DrafterConfig, width_in: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, width_in)
        self.mlp = MLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class OneLayerDrafter(Drafter):
    """A drafter whose rows pass one decoder layer. A subclass says what the layer takes
    (:meth:`start`, :meth:`mix`) and how it is read (:meth:`read`, :meth:`logits`)."""

    fc: nn.Linear

    #: Keys of ``config.json``, and of ``eagle_config`` in it, that ask for other arithmetic.
    variants: ClassVar[tuple[str, ...]] = (
        "attention_bias",
        "mlp_bias",
        "norm_before_residual",
        "norm_before_fc",
        "fc_norm",
        "use_aux_norm",
        "norm_output",
    )

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.frequencies = inverse_frequencies(config)

    @property
    @abstractmethod
    def layer(self) -> DecoderLayer: ...

    @abstractmethod
    def start(self, features: torch.Tensor) -> torch.Tensor:  # [rows, feature_width] -> [rows, H]
        """The target's features as a hidden state."""

    @abstractmethod
    def mix(self, embeds: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of the attention and the residual beside it, from a row's two inputs [rows, H]."""

    @abstractmethod
    def read(
        self, out: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [rows, H] twice
        """What the head reads, and the hidden state, from the MLP's output and its residual."""

    @abstractmethod
    def logits(
        self, read: torch.Tensor, lm_head: torch.Tensor | None = None
    ) -> torch.Tensor:  # [rows, draft_vocab] float32
        """Scores of the draft vocabulary; ``lm_head`` [vocab, H] is :meth:`shared_head`."""

    def shared_head(self, head: TargetHead) -> torch.Tensor | None:  # [vocab, H]
        """The target's lm_head for :meth:`logits`; None with a head of its own."""
        return None if self.has_own_head else head.lm_head

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @classmethod
    def check_json(cls, raw: Mapping[str, Any]) -> None:
        """Variants of one-layer drafters that trainers or SGLang know and that are not written
        here. ``norm_before_residual`` is not in SGLang either (0.5.23): it would serve other
        arithmetic than was trained, without a word."""
        if whole(raw, "num_hidden_layers", 1) != 1:
            raise AuroraError("only drafters of one layer are supported")
        eagle = mapping(raw, "eagle_config")
        for name in cls.variants:
            if raw.get(name) or eagle.get(name):
                raise AuroraError(f"drafters with {name} are not supported")

    def after_load(self) -> None:
        self.frequencies = inverse_frequencies(self.config)

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
        """What the head reads, and what the next drafted row takes for its hidden state."""
        layer = self.layer
        attention = layer.self_attn
        query = rotate(attention.heads(attention.q_proj(mixed)), positions, self._frequencies())
        attended = attend(query, *text, last_row, *(own or (None, None)))
        normed, residual = layer.post_attention_layernorm.after_add(
            attention.o_proj(attended.flatten(-2)), residual
        )
        return self.read(layer.mlp(normed), residual)

    def unroll(
        self,
        text: PackedText,
        head: TargetHead,
        *,
        steps: int,
        keep: Keep | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[DraftedRows]:
        """From base row b the first step takes the target's features; step k takes the token
        b + 1 + k of the log and the drafter's own hidden state of step k - 1, stands at rotary
        position b + k, and sees the text rows 0..b of its own request and its own earlier steps
        from b: the very attention of a served chain whose drafts were all accepted. All base rows
        of all requests run side by side (EAGLE-3, arXiv 2503.01840).
        """
        embeds = head.embed(text.tokens, dtype)
        mixed, residual = self.mix(embeds[text.next_tokens], self.start(text.features.to(dtype)))
        keys_values = self.keys_values(mixed, text.positions)
        base, lm_head = text.base(), self.shared_head(head)
        if not len(base):
            return []
        rows, position = base.rows, base.position.to(self.device)
        read, state = self.rows(
            mixed[rows], residual[rows], position, keys_values, base.visibility()
        )
        drafted = [DraftedRows(self.logits(read, lm_head), base)]
        own: tuple[torch.Tensor, torch.Tensor] | None = None
        for k in range(1, steps):
            base, parent = base.after(k, keep(k - 1, drafted[-1]) if keep else None)
            if not len(base):
                break
            position = base.position.to(self.device) + k
            mixed, residual = self.mix(embeds[base.tokens + 1 + k], state[parent])
            key, value = (x[:, None] for x in self.keys_values(mixed, position))
            if own is not None:
                key = torch.cat((own[0][parent], key), 1)
                value = torch.cat((own[1][parent], value), 1)
            own = (key, value)
            read, state = self.rows(mixed, residual, position, keys_values, base.visibility(), own)
            drafted.append(DraftedRows(self.logits(read, lm_head), base, parent))
        return drafted

    @torch.inference_mode()
    def propose(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        roots: torch.Tensor,
        shape: DraftShape,
        head: TargetHead,
    ) -> list[Draft]:
        beams = beam.beams(self, tokens, features, roots, shape, head, whole=True)
        return [proposal for one in beams for proposal in one.proposals()]

    @torch.inference_mode()
    def accepted(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        roots: torch.Tensor,
        shape: DraftShape,
        head: TargetHead,
    ) -> torch.Tensor:
        """Without the candidates that can't change what the log accepts."""
        parts = [b.accepted() for b in beam.beams(self, tokens, features, roots, shape, head)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def _frequencies(self) -> torch.Tensor:
        self.frequencies = self.frequencies.to(self.device)
        return self.frequencies
