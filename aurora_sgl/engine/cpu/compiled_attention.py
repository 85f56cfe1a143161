"""Paged attention on CPU in one compiled call: decode, verify and short prefills.

All requests and heads of a layer are one call, which reads keys and values where they lie in the
pool, so that a step copies no cache and loops over no request in Python.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from aurora_sgl.engine.cpu import native

LONGEST = 64  # new tokens of a request; longer prefills are faster as PyTorch's batched products


class ForwardPlan:
    """What all layers of one forward share: which tokens each query row sees, and where they lie.

    Holds the tensors whose addresses the compiled code reads.
    """

    def __init__(
        self,
        req_to_token: torch.Tensor,  # [rows, pool_len] int32
        req_pool_indices: torch.Tensor,  # [batch]
        seq_lens: torch.Tensor,  # [batch] with the new tokens
        *,
        window: int,
        news: torch.Tensor | None = None,  # [batch] new tokens; None: one each
        starts: torch.Tensor | None = None,  # [batch] first query row
        tree_mask: torch.Tensor | None = None,  # [batch * nodes * nodes] bool
        causal: bool = True,
    ) -> None:
        rows, lengths = _long(req_pool_indices), _long(seq_lens)
        self.keep: list[torch.Tensor] = [req_to_token, rows, lengths]
        longest, news_at, starts_at, tree_at = 1, None, None, None
        if news is not None and starts is not None:
            news, starts = _long(news), _long(starts)
            self.keep += [news, starts]
            longest = int(news.max())
            news_at, starts_at = news.data_ptr(), starts.data_ptr()
        if tree_mask is not None:
            tree_mask = tree_mask.contiguous()
            self.keep.append(tree_mask)
            tree_at = tree_mask.data_ptr()
        self.longest_new = longest
        self.struct = native.KernelPlan(
            table=req_to_token.data_ptr(),
            rows=rows.data_ptr(),
            lengths=lengths.data_ptr(),
            news=news_at,
            starts=starts_at,
            tree=tree_at,
            table_stride=req_to_token.stride(0),
            batch=rows.numel(),
            longest_new=longest,
            total=int(lengths.sum()),
            window=window,
            causal=causal,
        )
        self.address = ctypes.addressof(self.struct)


def _long(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int64).contiguous()


def fits(
    req_to_token: torch.Tensor, q: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor
) -> bool:
    """Whether the compiled attention covers these tensors and this machine has it."""
    return (
        native.library() is not None
        and q.dtype in native.KINDS
        and q.dtype == k_buffer.dtype == v_buffer.dtype
        and k_buffer.is_contiguous()
        and v_buffer.is_contiguous()
        and req_to_token.dtype == torch.int32
        and req_to_token.stride(-1) == 1
    )


def _side_by_side(x: torch.Tensor) -> bool:
    """Whether the elements of a row [width] or [heads, dim] follow each other."""
    if x.dim() == 2:
        return x.stride(1) == 1
    return x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2]


def attend(
    plan: ForwardPlan,
    q: torch.Tensor,  # [rows, heads, dim]
    o: torch.Tensor,  # [rows, heads, value dim], written
    k_buffer: torch.Tensor,  # [slots, kv_heads, dim]
    v_buffer: torch.Tensor,
    scale: float,
    logit_cap: float,
) -> None:
    """One layer's attention, softmax(q k^T * scale) v, in float32 inside."""
    library: Any = native.library()
    if not _side_by_side(q):
        q = q.contiguous()
    heads, dim = q.shape[1], q.shape[2]
    library.aurora_attention(
        native.KINDS[q.dtype], plan.address, q.data_ptr(), o.data_ptr(), k_buffer.data_ptr(),
        v_buffer.data_ptr(), heads, k_buffer.shape[1], dim, v_buffer.shape[2], q.stride(0),
        o.stride(0), scale, logit_cap,
    )  # fmt: skip
