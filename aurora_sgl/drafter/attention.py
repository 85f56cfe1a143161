"""The one attention of training and replay: text rows, and each query's own drafted rows.

A drafter row attends to the rows of the text up to its base row, and to the rows that were
drafted on its own way from there (a chain, or a path of the tree). A causal pass over the text has
no drafted rows; an unrolled training step has one a step; a tree node has its ancestors. So one
function covers the three, and another back end has one thing to replace.
"""

from __future__ import annotations

import torch

#: Scores of one block of queries: bounds the memory of long texts.
_BLOCK_SCORES = 1 << 24


def attend(
    query: torch.Tensor,  # [queries, heads, head_dim]
    text_key: torch.Tensor,  # [text, kv_heads, head_dim]
    text_value: torch.Tensor,  # [text, kv_heads, head_dim]
    last_row: torch.Tensor,  # [queries] int64: text rows 0..last_row are seen
    own_key: torch.Tensor | None = None,  # [queries, own, kv_heads, head_dim]
    own_value: torch.Tensor | None = None,  # [queries, own, kv_heads, head_dim]
) -> torch.Tensor:  # [queries, heads, head_dim]
    """Grouped-query attention; scores and softmax in float32, scale ``head_dim ** -0.5``."""
    queries, heads, _ = query.shape
    block = max(1, _BLOCK_SCORES // (heads * max(1, text_key.shape[0])))
    if queries <= block:
        return _attend(query, text_key, text_value, last_row, own_key, own_value)
    parts = []
    for begin in range(0, queries, block):
        rows = slice(begin, begin + block)
        keys = own_key[rows] if own_key is not None else None
        values = own_value[rows] if own_value is not None else None
        parts.append(_attend(query[rows], text_key, text_value, last_row[rows], keys, values))
    return torch.cat(parts)


def _attend(
    query: torch.Tensor,
    text_key: torch.Tensor,
    text_value: torch.Tensor,
    last_row: torch.Tensor,
    own_key: torch.Tensor | None,
    own_value: torch.Tensor | None,
) -> torch.Tensor:
    queries, heads, head_dim = query.shape
    text, kv_heads, _ = text_key.shape
    grouped = query.float().reshape(queries, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("qkgd,tkd->qkgt", grouped, text_key.float()).float()
    hidden = torch.arange(text, device=query.device)[None, :] > last_row[:, None]
    scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
    if own_key is not None:
        own = torch.einsum("qkgd,qjkd->qkgj", grouped, own_key.float()).float()
        scores = torch.cat((scores, own), -1)
    weights = (scores * head_dim**-0.5).softmax(-1)
    mixed = torch.einsum("qkgt,tkd->qkgd", weights[..., :text], text_value.float())
    if own_value is not None:
        mixed = mixed + torch.einsum("qkgj,qjkd->qkgd", weights[..., text:], own_value.float())
    return mixed.reshape(queries, heads, head_dim).to(query.dtype)
