"""Paged attention on CPU for SGLang's ``intel_amx`` backend: compiled, or in batched PyTorch.

Keys and values lie in a pool of slots, [slots, kv_heads, dim]; ``req_to_token`` names the slots of
each request's tokens. What is the same for all layers of one forward (slots, masks) is computed
once per forward: :func:`begin_forward`, hooked on the backend's metadata functions, starts anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from aurora_sgl.engine.cpu import compiled_attention
from aurora_sgl.engine.cpu.compiled_attention import ForwardPlan

KERNELS = ("decode_attention_cpu", "extend_attention_cpu")


@dataclass(frozen=True)
class _Rows:
    """Query rows of some requests of equal query length, with the keys that they may see."""

    query_rows: slice | torch.Tensor  # rows of the flat query
    requests: int
    queries: int  # query tokens per request
    slots: torch.Tensor  # [requests, longest] cache slots
    mask: torch.Tensor | None  # [requests, 1, queries, longest] True where visible; None: all


_plans: dict[tuple[object, ...], list[_Rows] | ForwardPlan] = {}
_keep: list[object] = []  # keeps the keyed tensors alive, so that an id cannot be used twice


def begin_forward() -> None:
    """Forget what was computed for the last forward."""
    _plans.clear()
    _keep.clear()


def _cached(
    key: tuple[object, ...], owners: tuple[object, ...]
) -> list[_Rows] | ForwardPlan | None:
    plan = _plans.get(key)
    if plan is None:
        _keep.extend(owners)
    return plan


def compiled_decode_plan(
    table: torch.Tensor,  # [rows, pool_len] int32
    rows: torch.Tensor,  # [batch] row of the table
    lengths: torch.Tensor,  # [batch] tokens, with the new one
    window: int,
) -> ForwardPlan:
    """What the compiled attention of this forward reads: one new token per request."""
    key = ("compiled", id(table), id(lengths), window)
    plan = _cached(key, (table, lengths))
    if not isinstance(plan, ForwardPlan):
        plan = _plans[key] = ForwardPlan(table, rows, lengths, window=window)
    return plan


def compiled_extend_plan(
    table: torch.Tensor,  # [rows, pool_len] int32
    rows: torch.Tensor,  # [batch] row of the table
    lengths: torch.Tensor,  # [batch] tokens, with the new ones
    news: torch.Tensor,  # [batch] new tokens
    starts: torch.Tensor,  # [batch] first query row
    window: int,
    tree_mask: torch.Tensor | None,  # [batch * nodes * nodes] bool
    causal: bool,
) -> ForwardPlan:
    """The same for several new tokens per request, which see each other causally or as a tree."""
    key = ("compiled", id(table), id(lengths), id(news), window, causal)
    plan = _cached(key, (table, lengths, news))
    if not isinstance(plan, ForwardPlan):
        plan = _plans[key] = ForwardPlan(
            table, rows, lengths, window=window, news=news, starts=starts, tree_mask=tree_mask,
            causal=causal,
        )  # fmt: skip
    return plan


def _attend(
    q: torch.Tensor,  # [rows, heads, dim]
    o: torch.Tensor,  # [rows, heads, value dim], written
    k_buffer: torch.Tensor,  # [slots, kv_heads, dim]
    v_buffer: torch.Tensor,  # [slots, kv_heads, value dim]
    plan: list[_Rows] | ForwardPlan,
    scale: float,
    logit_cap: float,
) -> None:
    if isinstance(plan, ForwardPlan):
        compiled_attention.attend(plan, q, o, k_buffer, v_buffer, scale, logit_cap)
        return
    heads, kv_heads = q.shape[1], k_buffer.shape[1]
    groups = heads // kv_heads
    for rows in plan:
        b, n = rows.requests, rows.queries
        keys = k_buffer[rows.slots].transpose(1, 2)  # [b, kv_heads, longest, dim]
        values = v_buffer[rows.slots].transpose(1, 2)
        query = q[rows.query_rows].view(b, n, kv_heads, groups, q.shape[-1])
        # Queries of one key head stand in one row block: [b, kv_heads, groups * n, dim].
        query = query.permute(0, 2, 3, 1, 4).reshape(b, kv_heads, groups * n, q.shape[-1])
        mask = rows.mask
        if mask is not None and mask.shape[2] != 1:
            mask = mask.repeat(1, 1, groups, 1)
        if logit_cap > 0:
            out = _capped(query, keys, values, mask, scale, logit_cap)
        else:
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        out = out.view(b, kv_heads, groups, n, -1).permute(0, 3, 1, 2, 4)
        o[rows.query_rows] = out.reshape(b * n, heads, -1).to(o.dtype)


def _capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    logit_cap: float,
) -> torch.Tensor:
    """Attention with the logits squeezed into (-cap, cap) by a tangent, as Gemma 2 does."""
    logits = (query @ keys.transpose(-1, -2)).float() * scale
    logits = logit_cap * torch.tanh(logits / logit_cap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return torch.softmax(logits, dim=-1).to(values.dtype) @ values


def _refuse(is_cross_attention: bool, sinks: object, k_buffer: torch.Tensor) -> None:
    if is_cross_attention or sinks is not None or k_buffer.dtype == torch.float8_e4m3fn:
        raise NotImplementedError(
            "cross attention, attention sinks and float8 KV caches have no CPU kernel here; "
            "serve this model on a GPU"
        )


def decode_attention_cpu(
    q: torch.Tensor,  # [batch, heads, dim]
    k_buffer: torch.Tensor,  # [slots, kv_heads, dim], written at loc
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    o: torch.Tensor,  # [batch, heads, value dim], written
    k: torch.Tensor | None,  # [batch, kv_heads * dim] the new tokens' keys
    v: torch.Tensor | None,
    loc: torch.Tensor,  # [batch] their slots
    attn_logits: torch.Tensor,  # scratch space of the compiled kernel, not used
    req_to_token: torch.Tensor,  # [rows, pool_len]
    req_pool_indices: torch.Tensor,  # [batch]
    seq_lens: torch.Tensor,  # [batch] with the new token
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool = False,
    sliding_window: int = 0,
    encoder_lens: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """One new token per request against its whole sequence; stores the token's keys first.

    Raises ``NotImplementedError`` for cross attention, sinks and float8 caches.
    """
    _refuse(is_cross_attn, sinks, k_buffer)
    if k is not None and v is not None:
        k_buffer[loc] = k.view(-1, *k_buffer.shape[1:])
        v_buffer[loc] = v.view(-1, *v_buffer.shape[1:])
    plan: list[_Rows] | ForwardPlan | None
    if compiled_attention.fits(req_to_token, q, k_buffer, v_buffer):
        plan = compiled_decode_plan(req_to_token, req_pool_indices, seq_lens, sliding_window)
        _attend(q, o, k_buffer, v_buffer, plan, sm_scale, logit_cap)
        return
    key = ("decode", id(req_to_token), id(seq_lens), sliding_window)
    plan = _cached(key, (req_to_token, seq_lens))
    if plan is None:
        lengths = seq_lens.to(torch.int64)
        longest = int(lengths.max())
        slots = req_to_token[req_pool_indices.to(torch.int64), :longest].to(torch.int64)
        column = torch.arange(longest)
        visible = column < lengths[:, None]
        if sliding_window > 0:
            visible &= column >= (lengths[:, None] - sliding_window)
        full = bool(visible.all())
        mask = None if full else visible[:, None, None, :]
        slots = slots if full else torch.where(visible, slots, 0)
        plan = [_Rows(slice(0, q.shape[0]), q.shape[0], 1, slots, mask)]
        _plans[key] = plan
    _attend(q, o, k_buffer, v_buffer, plan, sm_scale, logit_cap)


def extend_attention_cpu(
    q_extend: torch.Tensor,  # [rows, heads, dim]
    k_extend: torch.Tensor | None,  # already in the pool
    v_extend: torch.Tensor | None,
    o_extend: torch.Tensor,  # [rows, heads, value dim], written
    k_buffer: torch.Tensor,  # [slots, kv_heads, dim]
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: torch.Tensor,  # [rows, pool_len]
    req_pool_indices: torch.Tensor,  # [batch]
    seq_lens: torch.Tensor,  # [batch] prefix and new tokens
    extend_seq_lens: torch.Tensor,  # [batch] new tokens
    extend_start_loc: torch.Tensor,  # [batch] first row of each request
    max_len_extend: int,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool = False,
    sliding_window: int = 0,
    encoder_lens: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,  # [batch * nodes * nodes] bool, node i sees node j
    is_causal: bool = True,
) -> None:
    """New tokens of every request against its cached prefix and each other.

    Among the new tokens visibility is causal, or the tree mask's. Raises ``NotImplementedError``
    for cross attention, sinks and float8 caches.
    """
    _refuse(is_cross_attn, sinks, k_buffer)
    if q_extend.shape[0] == 0:
        return
    plan: list[_Rows] | ForwardPlan | None
    if max_len_extend <= compiled_attention.LONGEST and compiled_attention.fits(
        req_to_token, q_extend, k_buffer, v_buffer
    ):
        plan = compiled_extend_plan(
            req_to_token, req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc,
            sliding_window, tree_mask, is_causal,
        )  # fmt: skip
        _attend(q_extend, o_extend, k_buffer, v_buffer, plan, sm_scale, logit_cap)
        return
    key = ("extend", id(req_to_token), id(seq_lens), id(extend_seq_lens), sliding_window, is_causal)
    plan = _cached(key, (req_to_token, seq_lens, extend_seq_lens))
    if plan is None:
        plan = _plan_extend(
            req_to_token[req_pool_indices.to(torch.int64)],
            seq_lens.tolist(),
            extend_seq_lens.tolist(),
            extend_start_loc.tolist(),
            tree_mask,
            sliding_window,
            is_causal,
        )
        _plans[key] = plan
    _attend(q_extend, o_extend, k_buffer, v_buffer, plan, sm_scale, logit_cap)


def _plan_extend(
    table: torch.Tensor,  # [batch, pool_len]
    totals: list[int],
    news: list[int],
    starts: list[int],
    tree_mask: torch.Tensor | None,
    sliding_window: int,
    is_causal: bool,
) -> list[_Rows]:
    """One entry per distinct number of new tokens, so that a verify batch is a single call and a
    prefill batch of unlike prompts is not padded to its longest."""
    by_length: dict[int, list[int]] = {}
    for request, new in enumerate(news):
        if new > 0:
            by_length.setdefault(new, []).append(request)
    plan = []
    for new, requests in by_length.items():
        length = torch.tensor([totals[r] for r in requests])
        longest = int(length.max())
        column = torch.arange(longest)
        own = torch.arange(new)[None, :, None]  # query i of the new tokens
        offset = column[None, None, :] - (length[:, None, None] - new)  # key's place among the new
        if tree_mask is not None:
            among = tree_mask.view(-1, new, new)[requests]
            ancestry = torch.gather(among, 2, offset.clamp(0, new - 1).expand(-1, new, -1))
            visible = (offset < 0) | ((offset < new) & ancestry)
        elif is_causal:
            visible = offset <= own
        else:
            visible = (offset < new).expand(-1, new, -1)
        if sliding_window > 0:
            visible = visible & (offset > own - sliding_window)
        visible = visible.expand(len(requests), new, longest)
        slots = table[requests, :longest].to(torch.int64)
        slots = torch.where(column < length[:, None], slots, 0)
        if len(requests) == len(news):
            rows: slice | torch.Tensor = slice(starts[0], starts[0] + new * len(news))
        else:
            rows = torch.cat([torch.arange(starts[r], starts[r] + new) for r in requests])
        mask = None if bool(visible.all()) else visible[:, None]
        plan.append(_Rows(rows, len(requests), new, slots, mask))
    return plan
