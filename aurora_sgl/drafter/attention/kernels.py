"""Attention over text rows in PyTorch: forward kernels that return a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aurora_sgl.drafter.attention.seen import Seen
from aurora_sgl.drafter.attention.states import LOG2_E, AttentionState, grouped, merge, wide

#: (query [queries, heads, head_dim], key and value [text, kv_heads, head_dim], who sees what)
TextKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Seen], AttentionState]

#: Pairs of query and row, over all heads, in one block: bounds the memory of long texts.
BLOCK_SCORES = 1 << 24
#: Queries of one block: on the CPU a small block skips most of what a causal mask hides.
BLOCK_ROWS = {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class Kernels:
    """The forward half of a backend. The backward is the same for all of them."""

    name: str
    text: TextKernel
    merge: Callable[[AttentionState, AttentionState], AttentionState] = merge


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visibility: Seen
) -> AttentionState:
    """The definition, in blocks: any device, any dtype; scores and sums in float32 or float64."""
    queries, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    outs, lses = [], []
    for block in visibility.blocks(BLOCK_SCORES // heads, BLOCK_ROWS["cuda"], query.device):
        by_key = grouped(wide(query[block.queries]), kv_heads)
        scores = torch.einsum("qkgd,tkd->qkgt", by_key, wide(key[block.text]))
        scores[..., block.tail].masked_fill_(block.hidden[:, None, None], -math.inf)
        scores *= head_dim**-0.5
        outs.append(torch.einsum("qkgt,tkd->qkgd", scores.softmax(-1), wide(value[block.text])))
        lses.append(scores.logsumexp(-1) * LOG2_E)
    out = torch.cat(outs).reshape(query.shape)
    return AttentionState(out.to(query.dtype), torch.cat(lses).reshape(queries, heads))


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visibility: Seen
) -> AttentionState:
    """The kernel that ``F.scaled_dot_product_attention`` runs on a CPU, in float32.

    Called by its own name because only it hands out the log-sum-exp (torch 2.11 to 2.13). On CPUs
    without AMX its bfloat16 is not faster. Elsewhere than on a CPU this is :func:`plain`.
    """
    if query.device.type != "cpu":
        return plain(query, key, value, visibility)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:2], dtype=wide(query[:0]).dtype)
    for queries, text, mask in visibility.requests():
        count, length = queries.stop - queries.start, text.stop - text.start
        square = mask is None and count == length
        if mask is None and not square:
            mask = torch.arange(length) <= torch.arange(length - count, length)[:, None]
        part, scores = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(query[queries], query.shape[1]),
            _heads_first(key[text], query.shape[1]),
            _heads_first(value[text], query.shape[1]),
            is_causal=square,
            attn_mask=None if mask is None else _as_bias(mask, lse.dtype),
        )
        out[queries] = part[0].transpose(0, 1)
        lse[queries] = scores[0].T * LOG2_E
    return AttentionState(out, lse)


def _heads_first(x: torch.Tensor, heads: int) -> torch.Tensor:  # [1, heads, rows, head_dim]
    return wide(x).repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)[None]


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)
