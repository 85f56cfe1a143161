"""The one attention of training and replay: text rows, and each query's own drafted rows.

A drafter row attends to the rows of the text up to its base row, and to the rows that were
drafted on its own way from there (a chain, or a path of the tree). A causal pass over the text has
no drafted rows; an unrolled training step has one a step, the *diagonal*; a tree node has its
ancestors. Trees can also be given whole, as rows behind the text and a mask. So one function
covers all uses, for one request or for several packed behind each other without padding.

A forward kernel gives the output and the log-sum-exp over the text rows (FlashInfer on CUDA,
PyTorch elsewhere), the own rows are merged in, and one backward serves all kernels.
"""

from __future__ import annotations

import torch

from aurora_sgl.drafter.attention.backends import NAMES, choose, using
from aurora_sgl.drafter.attention.function import AttentionFunction
from aurora_sgl.drafter.attention.seen import Seen

__all__ = ["NAMES", "Seen", "attend", "using"]


def attend(
    query: torch.Tensor,  # [queries, heads, head_dim]
    text_key: torch.Tensor,  # [text, kv_heads, head_dim]
    text_value: torch.Tensor,  # [text, kv_heads, head_dim]
    last_row: torch.Tensor | Seen,  # [queries] int64: text rows 0..last_row are seen
    own_key: torch.Tensor | None = None,  # [queries, own, kv_heads, head_dim]
    own_value: torch.Tensor | None = None,  # [queries, own, kv_heads, head_dim]
    own_seen: torch.Tensor | None = None,  # [queries, own] bool; default: all
) -> torch.Tensor:  # [queries, heads, head_dim], in the query's dtype
    """Grouped-query attention with scale ``head_dim ** -0.5``, differentiable in all but masks.

    Scores, softmax and gradients are computed in float32 (float64 for float64); FlashInfer rounds
    the weights to the query's dtype. A :class:`Seen` in place of ``last_row`` packs requests, takes
    masks, and on a GPU saves the look at ``last_row``.
    """
    visibility = last_row if isinstance(last_row, Seen) else Seen.up_to(last_row)
    assert visibility.queries == len(query), (visibility.queries, len(query))
    key, value = (visibility.pick(x).to(query.dtype) for x in (text_key, text_value))
    assert visibility.text == len(key), (visibility.text, len(key))
    if own_key is not None and own_value is not None:
        own_key, own_value = own_key.to(query.dtype), own_value.to(query.dtype)
    kernels = choose(query, key.shape[1])
    out: torch.Tensor = AttentionFunction.apply(  # type: ignore[no-untyped-call]
        kernels, visibility, query, key, value, own_key, own_value, own_seen
    )
    return out
