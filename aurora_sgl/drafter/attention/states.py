"""Attention states: the output over some rows, and the log-sum-exp of their scores in base 2.

States over disjoint rows merge into the state over all of them, so text rows can run in one kernel
and the few drafted rows beside it. Base 2 is what FlashInfer's kernels take and return: its state's
``get_lse`` is ``m + log2(d)`` over scores times log2(e), and ``merge_state`` takes "logsumexp
values with base 2" (include/flashinfer/attention/state.cuh and cascade.cuh, 0.6.15 and 0.6.18).
Source of the merge: FlashInfer, arXiv 2501.01005, section 2.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

LOG2_E = math.log2(math.e)


class AttentionState(NamedTuple):
    out: torch.Tensor  # [queries, heads, head_dim]
    lse: torch.Tensor  # [queries, heads], base 2; -inf where no row is seen


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """The state over the rows of both, in the dtype of ``a``. ``a`` must have seen a row."""
    top = torch.maximum(a.lse, b.lse)
    weight_a, weight_b = (a.lse - top).exp2(), (b.lse - top).exp2()
    total = weight_a + weight_b
    out = a.out * (weight_a / total)[..., None] + b.out * (weight_b / total)[..., None]
    return AttentionState(out.to(a.out.dtype), top + total.log2())


def wide(x: torch.Tensor) -> torch.Tensor:
    """The dtype that scores and sums are computed in: float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[rows, heads, ...] -> [rows, kv_heads, heads / kv_heads, ...]: who shares a key head."""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


# One own row at a time: there are few, batches of tiny matrix products are slow on CPUs, and no
# product of queries, own rows, heads and head_dim is ever held.


def dots(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """[queries, kv_heads, group, head_dim] and own rows -> [queries, kv_heads, group, own]"""
    return torch.stack([(x * row[:, :, None]).sum(-1) for row in wide(own).unbind(1)], -1)


def mix(weights: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """[queries, kv_heads, group, own] and own rows -> [queries, kv_heads, group, head_dim]"""
    rows = wide(own).unbind(1)
    mixed = weights[..., :1] * rows[0][:, :, None]
    for j, row in enumerate(rows[1:], 1):
        mixed = mixed.addcmul_(weights[..., j, None], row[:, :, None])
    return mixed


def spread(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What :func:`mix` sends back to the own rows: [queries, own, kv_heads, head_dim]"""
    return torch.stack([(w[..., None] * x).sum(2) for w in weights.unbind(-1)], 1)


def own_scores(
    query: torch.Tensor,  # [queries, heads, head_dim]
    own_key: torch.Tensor,  # [queries, own, kv_heads, head_dim]
    own_seen: torch.Tensor | None,  # [queries, own] bool
) -> torch.Tensor:  # [queries, kv_heads, group, own] in base 2, -inf where not seen
    """Scores of each query against its own drafted rows."""
    scale = query.shape[-1] ** -0.5 * LOG2_E
    scores = dots(grouped(wide(query) * scale, own_key.shape[2]), own_key)
    if own_seen is None:
        return scores
    return scores.masked_fill(~own_seen[:, None, None], -math.inf)


def own_state(
    query: torch.Tensor,
    own_key: torch.Tensor,
    own_value: torch.Tensor,  # [queries, own, kv_heads, head_dim]
    own_seen: torch.Tensor | None,
) -> AttentionState:
    """Attention of each query over its own drafted rows, out in :func:`wide`'s dtype."""
    scores = own_scores(query, own_key, own_seen)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp2()
    total = weights.sum(-1, keepdim=True)
    shares = weights / total.clamp(min=torch.finfo(total.dtype).tiny)
    lse = (top + total.log2()).reshape(query.shape[:2])
    return AttentionState(mix(shares, own_value).reshape(query.shape), lse)
