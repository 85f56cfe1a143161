"""Where tokens lie in the KV cache: the index kernels of SGLang's speculative decoding, on CPU.

``req_to_token[r, i]`` is the cache slot of token ``i`` of request row ``r``. Argument names and
order are SGLang's (read in 0.5.17 to 0.5.23).
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

KERNELS = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
)


def _ragged_cells(
    rows: torch.Tensor,  # [batch]
    start: torch.Tensor,  # [batch]
    end: torch.Tensor,  # [batch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every cell of the ranges ``rows[i], start[i]:end[i]``, in order."""
    lengths = (end - start).to(torch.int64)
    first = torch.cumsum(lengths, 0) - lengths
    total = int(lengths.sum())
    columns = torch.arange(total) + torch.repeat_interleave(start.to(torch.int64) - first, lengths)
    return torch.repeat_interleave(rows.to(torch.int64), lengths), columns


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,  # [batch]
    req_to_token: torch.Tensor,  # [rows, pool_len], written
    start_offset: torch.Tensor,  # [batch]
    end_offset: torch.Tensor,  # [batch]
    out_cache_loc: torch.Tensor,  # [sum(end - start)]
    pool_len: int,
) -> None:
    """Write new slots into the table: ``req_to_token[r, start:end] = out_cache_loc[...]``."""
    rows, columns = _ragged_cells(req_pool_indices, start_offset, end_offset)
    req_to_token[rows, columns] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,  # [batch]
    req_to_token: torch.Tensor,  # [rows, pool_len]
    start_offset: torch.Tensor,  # [batch]
    end_offset: torch.Tensor,  # [batch]
    out_cache_loc: torch.Tensor,  # [>= sum(end - start)], written
    pool_len: int,
) -> None:
    """Read slots out of the table: ``out_cache_loc[...] = req_to_token[r, start:end]``."""
    rows, columns = _ragged_cells(req_pool_indices, start_offset, end_offset)
    out_cache_loc[: rows.numel()] = req_to_token[rows, columns].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,  # [batch]
    req_to_token: torch.Tensor,  # [rows, pool_len]
    seq_lens: torch.Tensor,  # [batch]
    out_cache_loc: torch.Tensor,  # [batch * topk * steps], written
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
) -> None:
    """The ``topk * steps`` slots after each sequence, for the drafter's own tokens."""
    columns = seq_lens.to(torch.int64)[:, None] + torch.arange(topk * speculative_num_steps)
    slots = req_to_token[req_pool_indices.to(torch.int64)[:, None], columns]
    out_cache_loc.copy_(slots.reshape(-1))


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor,  # [batch, stride] or flat
    accept_lens: torch.Tensor,  # [batch], counts the bonus token
    bonus_tokens: torch.Tensor,  # [batch], written
    accept_stride: int,
) -> None:
    """The last accepted token of each request."""
    indices = torch.arange(accept_lens.numel()) * accept_stride + accept_lens.to(torch.int64) - 1
    bonus_tokens.copy_(accept_tokens.reshape(-1)[indices])


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor,  # [batch, depth + 1], -1 where nothing was accepted
    out_cache_loc: torch.Tensor,  # [batch * nodes]
    accept_out_cache_loc: torch.Tensor,  # written from the front
) -> None:
    """Cache slots of the accepted nodes, packed."""
    accepted = accept_index.reshape(-1)
    accepted = accepted[accepted >= 0].to(torch.int64)
    accept_out_cache_loc[: accepted.numel()] = out_cache_loc[accepted]


_views: dict[tuple[int, int], np.ndarray] = {}


def _byte_rows(pointer: int, row_bytes: int, rows: int) -> np.ndarray:
    """Memory at ``pointer`` as [rows, row_bytes]; SGLang hands KV buffers over as addresses."""
    view = _views.get((pointer, row_bytes))
    if view is None or view.shape[0] < rows:
        memory = (ctypes.c_uint8 * (rows * row_bytes)).from_address(pointer)
        view = np.ctypeslib.as_array(memory).reshape(rows, row_bytes)
        _views[pointer, row_bytes] = view
    return view


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor,  # [buffers] addresses of the K and V buffers of all layers
    strides: torch.Tensor,  # [buffers] bytes of one slot
    tgt_loc: torch.Tensor,  # [n]
    src_loc: torch.Tensor,  # [n]
) -> None:
    """Move slots ``src -> tgt`` in every layer, as if all were read before any is written."""
    moved = tgt_loc != src_loc
    if not bool(moved.any()):
        return
    target = tgt_loc[moved].numpy()
    source = src_loc[moved].numpy()
    rows = int(max(target.max(), source.max())) + 1
    for pointer, row_bytes in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        buffer = _byte_rows(pointer, row_bytes, rows)
        buffer[target] = buffer[source]
