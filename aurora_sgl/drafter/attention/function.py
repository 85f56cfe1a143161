"""Attention with any forward kernel that returns a state, and one backward for all of them.

Backward of FlashAttention-2 (Dao, arXiv 2307.08691, section 3.1, algorithm 2): with the saved
output O and log-sum-exp L, each block of queries recomputes its weights and needs no more memory
than its scores:

    P = exp2(S - L)                S: scores in base 2
    dV += P^T dO                   dP = dO V^T
    D = rowsum(dO * O)             dS = P * (dP - D)
    dQ += dS K * scale             dK += dS^T Q * scale

O and L are those of the merged state, over the text rows and the query's own drafted rows. P then
is the share of a row among all rows, so the same lines give the gradients of both parts. Heads
that share a key head (grouped queries) add up in its gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from aurora_sgl.drafter.attention.kernels import BLOCK_ROWS, BLOCK_SCORES, Kernels
from aurora_sgl.drafter.attention.seen import Seen
from aurora_sgl.drafter.attention.states import (
    LOG2_E,
    dots,
    grouped,
    mix,
    own_scores,
    own_state,
    spread,
    wide,
)


class AttentionFunction(torch.autograd.Function):
    """``apply(kernels, seen, query, key, value, own_key, own_value, own_seen)``, one at a time
    as :func:`aurora_sgl.drafter.attention.attend` documents them."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        visibility: Seen,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        own_key: torch.Tensor | None,
        own_value: torch.Tensor | None,
        own_seen: torch.Tensor | None,
    ) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            state = kernels.text(query, key, value, visibility)
            if own_key is not None and own_value is not None:
                state = kernels.merge(state, own_state(query, own_key, own_value, own_seen))
        ctx.visibility = visibility
        ctx.save_for_backward(query, key, value, own_key, own_value, own_seen, *state)
        return state.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, own_key, own_value, own_seen, out, lse = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            delta = (wide(grad_out) * wide(out)).sum(-1)  # [queries, heads]
            grads = text_backward(ctx.visibility, query, key, value, lse, delta, grad_out)
            own: tuple[torch.Tensor | None, ...] = (None, None)
            if own_key is not None:
                more, *own_grads = own_backward(
                    query, own_key, own_value, own_seen, lse, delta, grad_out
                )
                grads[0].add_(more)
                own = (own_grads[0].to(own_key.dtype), own_grads[1].to(own_value.dtype))
        text = (g.to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True))
        return None, None, *text, *own, None


def text_backward(
    visibility: Seen,
    query: torch.Tensor,  # [queries, heads, head_dim]
    key: torch.Tensor,  # [text, kv_heads, head_dim]
    value: torch.Tensor,  # [text, kv_heads, head_dim]
    lse: torch.Tensor,  # [queries, heads], base 2, over all rows that a query sees
    delta: torch.Tensor,  # [queries, heads]: D
    grad_out: torch.Tensor,  # [queries, heads, head_dim]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value over the text rows, in :func:`wide`'s dtype."""
    heads, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    scale = head_dim**-0.5
    q = grouped(wide(query) * scale, kv_heads).transpose(0, 1).contiguous()
    d_out = grouped(wide(grad_out), kv_heads).transpose(0, 1).contiguous()
    k, v = (wide(x).transpose(0, 1).contiguous() for x in (key, value))
    less_lse, less_delta = (grouped(-x, kv_heads).transpose(0, 1) for x in (lse / LOG2_E, delta))
    d_q = torch.empty_like(q)
    d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
    rows = BLOCK_ROWS.get(query.device.type, BLOCK_ROWS["cuda"])
    for block in visibility.blocks(BLOCK_SCORES // heads, rows, query.device):
        queries, text = block.queries, block.text
        shape = (kv_heads, queries.stop - queries.start, heads // kv_heads, text.stop - text.start)
        q_, do_ = q[:, queries].flatten(1, 2), d_out[:, queries].flatten(1, 2)
        # The matrix products start from -L and from -D, spread over the rows.
        scores = torch.baddbmm(_column(less_lse[:, queries]), q_, k[:, text].transpose(1, 2))
        scores = scores.view(shape)
        scores[..., block.tail].masked_fill_(block.hidden[None, :, None], -math.inf)
        p = scores.exp_()
        d_p = torch.baddbmm(_column(less_delta[:, queries]), do_, v[:, text].transpose(1, 2))
        d_s = d_p.view(shape).mul_(p).flatten(1, 2)
        d_v[:, text].baddbmm_(p.flatten(1, 2).transpose(1, 2), do_)
        d_k[:, text].baddbmm_(d_s.transpose(1, 2), q_)
        d_q[:, queries] = torch.bmm(d_s, k[:, text]).view_as(d_q[:, queries])
    d_query = d_q.mul_(scale).transpose(0, 1).reshape(query.shape)
    return d_query, d_k.transpose(0, 1), d_v.transpose(0, 1)


def _column(x: torch.Tensor) -> torch.Tensor:
    """[kv_heads, queries, group] -> [kv_heads, queries * group, 1]"""
    return x.flatten(1, 2)[..., None]


def own_backward(
    query: torch.Tensor,
    own_key: torch.Tensor,  # [queries, own, kv_heads, head_dim]
    own_value: torch.Tensor,
    own_seen: torch.Tensor | None,  # [queries, own] bool
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, own key and own value, in :func:`wide`'s dtype."""
    kv_heads, scale = own_key.shape[2], query.shape[-1] ** -0.5
    p = (own_scores(query, own_key, own_seen) - grouped(lse, kv_heads)[..., None]).exp2()
    d_out = grouped(wide(grad_out), kv_heads)
    d_s = p * (dots(d_out, own_value) - grouped(delta, kv_heads)[..., None]) * scale
    d_query = mix(d_s, own_key).reshape(query.shape)
    return d_query, spread(d_s, grouped(wide(query), kv_heads)), spread(p, d_out)
