"""Decoder layers of the Llama family on CPU, each as one compiled call.

Between two additions to the residual stream SGLang calls some fifteen modules of a few microseconds
each; for one token they take as long as a tenth of the arithmetic. A layer that is plain (one
process, no quantisation, no adapter, full attention over an ordinary cache) is computed by
``aurora_layer`` of ``layer.h``; any other, and long prefills, go SGLang's own way. The target's
layers and an EAGLE3 drafter's are covered.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from aurora_sgl.engine.cpu import attention, fused, linear, native, upstream
from aurora_sgl.engine.cpu.compiled_attention import LONGEST, ForwardPlan

BACKEND = "IntelAMXAttnBackend"  # of the forwards that are compiled

_PLAIN = {
    "qkv_proj": "QKVParallelLinear",
    "o_proj": "RowParallelLinear",
    "gate_up_proj": "MergedColumnParallelLinear",
    "down_proj": "RowParallelLinear",
}


class CompiledLayer:
    """What ``aurora_layer`` reads of one layer, and the tensors whose addresses it holds."""

    def __init__(self, layer: Any, rows: torch.Tensor, pool: Any) -> None:
        """Raises ``ValueError`` with the reason for a layer that is not covered."""
        attend, mlp, rotary = layer.self_attn, layer.mlp, layer.self_attn.rotary_emb
        parts = {
            "qkv_proj": attend.qkv_proj,
            "o_proj": attend.o_proj,
            "gate_up_proj": mlp.gate_up_proj,
            "down_proj": mlp.down_proj,
        }
        for name, part in parts.items():
            _need(type(part).__name__ == _PLAIN[name], f"{name} is a {type(part).__name__}")
            _need(
                type(part.quant_method).__name__ == "UnquantizedLinearMethod",
                f"{name} is quantised",
            )
            _need(upstream.processes(part) == 1, "its weights are shared among processes")
        radix = attend.attn
        _need(type(mlp.act_fn).__name__ == "SiluAndMul", "another activation")
        _need(
            type(rotary).__name__ in ("RotaryEmbedding", "Llama3RotaryEmbedding"),
            f"its rotary embedding is a {type(rotary).__name__}",
        )
        _need(radix.attn_type.value == "decoder", "it is no decoder")
        _need(radix.sliding_window_size == -1, "it has a sliding window")
        _need(not radix.is_cross_attention, "it attends to another sequence")
        _need(radix.qk_head_dim == radix.v_head_dim, "keys and values differ in size")
        _need(type(pool).__name__ == "MHATokenToKVPool", f"its cache is a {type(pool).__name__}")
        _need(pool.layer_transfer_counter is None, "its cache is loaded from elsewhere")
        keys = pool.get_key_buffer(radix.layer_id)
        values = pool.get_value_buffer(radix.layer_id)
        second = getattr(layer, "hidden_norm", None)
        norms = [layer.input_layernorm, layer.post_attention_layernorm, second]
        weights = [part.weight for part in parts.values()]
        biases = [part.bias for part in parts.values()]
        tensors = [*weights, *(n.weight for n in norms if n is not None), keys, values]
        tensors += [bias for bias in biases if bias is not None]
        dtype = rows.dtype
        _need(dtype in native.KINDS, f"it computes in {dtype}")
        _need(all(t.dtype == dtype and t.is_contiguous() for t in tensors), "mixed dtypes")
        angles = rotary.cos_sin_cache
        _need(angles.dtype in native.KINDS and angles.is_contiguous(), "the rotary table's dtype")
        for norm in norms:
            _need(norm is None or plain_norm(norm), "a norm is of another kind")
        hidden = layer.input_layernorm.weight.shape[0]
        inner = mlp.down_proj.weight.shape[1]
        heads, kv_heads, dim = radix.tp_q_head_num, radix.tp_k_head_num, radix.head_dim
        shapes = [
            ((heads + 2 * kv_heads) * dim, hidden * (2 if second is not None else 1)),
            (hidden, heads * dim),
            (2 * inner, hidden),
            (hidden, inner),
        ]
        _need([tuple(w.shape) for w in weights] == shapes, "its weights have other shapes")
        addresses = [t.data_ptr() for t in weights]
        bias_addresses = [None if bias is None else bias.data_ptr() for bias in biases]
        self.pool, self.dtype, self.hidden = pool, dtype, hidden
        self._keep = (tensors, angles)
        self._all_addresses = [t.data_ptr() for t in tensors]
        self._weights, self._addresses = weights, addresses
        self.struct = native.Layer(
            norm=layer.input_layernorm.weight.data_ptr(),
            second_norm=None if second is None else second.weight.data_ptr(),
            qkv=addresses[0], qkv_bias=bias_addresses[0],
            o=addresses[1], o_bias=bias_addresses[1],
            post_norm=layer.post_attention_layernorm.weight.data_ptr(),
            gate_up=addresses[2], gate_up_bias=bias_addresses[2],
            down=addresses[3], down_bias=bias_addresses[3],
            angles=angles.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(),
            hidden=hidden, inner=inner, heads=heads, kv_heads=kv_heads, dim=dim,
            rotary_dim=rotary.rotary_dim, positions=angles.shape[0],
            eps=layer.input_layernorm.variance_epsilon,
            second_eps=0.0 if second is None else second.variance_epsilon,
            post_eps=layer.post_attention_layernorm.variance_epsilon,
            scale=radix.scaling, cap=radix.logit_cap, kind=native.KINDS[dtype],
            angles_kind=native.KINDS[angles.dtype], neox=rotary.is_neox_style,
        )  # fmt: skip
        self.address = ctypes.addressof(self.struct)

    def current(self, pool: Any, rows: torch.Tensor) -> bool:
        """Whether the addresses are still those of this layer's weights and cache."""
        return (
            pool is self.pool
            and rows.dtype == self.dtype
            and [weight.data_ptr() for weight in self._weights] == self._addresses
        )

    def moved(self) -> bool:
        """Whether any tensor, also a norm's weight, lies elsewhere now."""
        return [t.data_ptr() for t in self._keep[0]] != self._all_addresses


def _need(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


def plain_norm(norm: Any) -> bool:
    """Whether the compiled norm is this one: no other class, none of the variants."""
    return type(norm).__name__ == "RMSNorm" and fused.plain_norm(norm)


_layers: dict[int, tuple[Any, CompiledLayer | str]] = {}  # id of the layer -> itself, or why not


def forget() -> None:
    """Look at every layer anew: somebody may have replaced weights."""
    _layers.clear()


def forget_moved() -> None:
    """Look anew at the layers that a swap has given other memory."""
    for key, (_, entry) in list(_layers.items()):
        if isinstance(entry, CompiledLayer) and entry.moved():
            del _layers[key]


def refusals() -> set[str]:
    """Why layers went SGLang's own way so far."""
    return {reason for _, reason in _layers.values() if isinstance(reason, str)}


def compiled(layer: Any, rows: torch.Tensor, pool: Any) -> CompiledLayer | None:
    """The layer as the compiled code reads it, or None for one that is not covered."""
    entry = _layers.get(id(layer))
    if entry is not None and isinstance(entry[1], CompiledLayer):
        if entry[1].current(pool, rows):
            return entry[1]
    elif entry is not None:
        return None
    outcome: CompiledLayer | str
    try:
        outcome = CompiledLayer(layer, rows, pool)
    except (ValueError, AttributeError) as reason:
        outcome = str(reason)
        if outcome not in refusals():
            linear.logger.warning(
                "aurora: layers go SGLang's own way, which is slower: %s", outcome
            )
    _layers[id(layer)] = (layer, outcome)
    return outcome if isinstance(outcome, CompiledLayer) else None


def plan_of(backend: Any, forward_batch: Any) -> ForwardPlan | None:
    """Which tokens each row sees, as ``IntelAMXAttnBackend`` would tell its kernels."""
    mode = forward_batch.forward_mode
    if mode.is_decode():
        given = backend.draft_decode_metadata
        if given is not None:
            table, lengths, rows = given
        else:
            table = backend.req_to_token_pool.req_to_token
            lengths, rows = forward_batch.seq_lens, forward_batch.req_pool_indices
        if not int_table(table) or lengths.dtype != torch.int64:
            return None
        return attention.compiled_decode_plan(table, rows, lengths, 0)
    if mode.is_idle() or backend.extend_metadata is None:
        return None  # every other mode is an extension to the backend
    lengths, news, starts, tree_mask = backend.extend_metadata
    longest = backend.forward_metadata[1]
    table = backend.req_to_token_pool.req_to_token
    if longest > LONGEST or not int_table(table) or lengths.dtype != torch.int64:
        return None
    rows = forward_batch.req_pool_indices
    return attention.compiled_extend_plan(table, rows, lengths, news, starts, 0, tree_mask, True)


def int_table(table: torch.Tensor) -> bool:
    """Whether the compiled code reads this table of cache slots."""
    return table.dtype == torch.int32 and table.stride(-1) == 1


@lru_cache(maxsize=1)
def _backend_getter() -> Callable[[], Any]:
    from sglang.srt.model_executor.forward_context import get_attn_backend

    return get_attn_backend  # type: ignore[no-any-return]


def backend_of_this_forward() -> Any | None:
    """SGLang's attention backend of the forward that runs now; None for one that is not ours."""
    backend = _backend_getter()()
    return backend if type(backend).__name__ == BACKEND else None


def _run(
    layer: Any,
    positions: torch.Tensor,
    forward_batch: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    embedded: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    backend = backend_of_this_forward()
    plan = plan_of(backend, forward_batch) if backend is not None else None
    if plan is None:
        return None
    slots = forward_batch.out_cache_loc
    return run(layer, backend, plan, positions, slots, x, residual, embedded)


def covers(
    positions: torch.Tensor,
    slots: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    embedded: torch.Tensor | None = None,
) -> bool:
    """Whether tensors as :func:`run` takes them are such that the compiled code reads."""
    count = x.shape[0]
    return not (
        count == 0
        or (count > linear.FEW and linear.choose().many != linear.OWN)
        or (x.dtype == torch.bfloat16 and linear.choose().few != linear.OWN)
        or positions.dim() != 1
        or positions.dtype != torch.int64
        or slots.dtype != torch.int64
        or not (x.is_contiguous() and positions.is_contiguous() and slots.is_contiguous())
        or not (residual is None or residual.is_contiguous())
        or not (embedded is None or (embedded.is_contiguous() and embedded.dtype == x.dtype))
        or positions.shape[0] != count
        or slots.shape[0] != count
    )


def run(
    layer: Any,
    backend: Any,
    plan: ForwardPlan,
    positions: torch.Tensor,  # [rows] int64
    slots: torch.Tensor,  # [rows] int64
    x: torch.Tensor,  # [rows, hidden]
    residual: torch.Tensor | None,  # [rows, hidden], updated; None: x is
    embedded: torch.Tensor | None,  # [rows, hidden] of a drafter's layer
) -> tuple[torch.Tensor, torch.Tensor] | None:  # both [rows, hidden]
    """A layer's output and the residual; None, with nothing done, for what is not covered."""
    if not covers(positions, slots, x, residual, embedded):
        return None
    compiled_layer = compiled(layer, x, backend.token_to_kv_pool)
    if compiled_layer is None or x.shape[1] != compiled_layer.hidden:
        return None
    first = residual is None
    if residual is None:
        residual = x
    out = torch.empty_like(x) if first else x
    library: Any = native.library()
    library.aurora_layer(
        compiled_layer.address, plan.address, positions.data_ptr(), slots.data_ptr(), x.shape[0],
        x.data_ptr(), residual.data_ptr(), out.data_ptr(),
        None if embedded is None else embedded.data_ptr(),
    )  # fmt: skip
    return out, residual


# -- hooks: see upstream.Beside -------------------------------------------------------------------


def target_layer(
    layer: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``llama.LlamaDecoderLayer.forward`` until SGLang 0.5.21. Later ones keep the residual in the
    batch, and only all layers together are compiled (``layers.target_body``)."""
    return _run(layer, positions, forward_batch, hidden_states, residual, None)


def drafter_layer(
    layer: Any,
    positions: torch.Tensor,
    embeds: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``llama_eagle3.LlamaDecoderLayer.forward`` of the first layer."""
    if not layer.is_input_layer or residual is not None:
        return None
    return _run(layer, positions, forward_batch, hidden_states, None, embeds)
