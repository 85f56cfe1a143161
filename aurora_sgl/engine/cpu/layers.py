"""The target's decoder layers in one compiled call, or one between two states that a drafter reads.

A layer alone is a compiled call already (``layer.py``); SGLang's way from each to the next takes a
tenth of a millisecond, which thirty layers of a small model make a tenth of a decode step.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import torch

from aurora_sgl.engine.cpu import fused, layer, native
from aurora_sgl.engine.cpu.layer import CompiledLayer


class Body:
    """The compiled layers of one model, in order, and where each group of them begins."""

    def __init__(self, parts: list[CompiledLayer], captured: list[int]) -> None:
        self.parts, self.captured = parts, captured
        self._addresses = (ctypes.c_void_p * len(parts))(*(part.address for part in parts))
        inside = {index for index in captured if index < len(parts)}
        self.groups = list(pairwise(sorted({0, len(parts)} | inside)))

    def address(self, index: int) -> int:
        return ctypes.addressof(self._addresses) + index * ctypes.sizeof(ctypes.c_void_p)


_bodies: dict[int, tuple[Any, Body | None]] = {}  # id of the model -> itself; None: not covered


def forget() -> None:
    """Look at every model anew: somebody may have replaced weights."""
    _bodies.clear()


def _body(model: Any, rows: torch.Tensor, pool: Any) -> Body | None:
    entry = _bodies.get(id(model))
    if entry is not None:
        body = entry[1]
        if body is None:
            return None
        same = body.captured == list(model.layers_to_capture)
        if same and all(part.current(pool, rows) for part in body.parts):
            return body
    parts = [layer.compiled(one, rows, pool) for one in model.layers] if _plain(model) else []
    complete = [part for part in parts if part is not None and part.hidden == rows.shape[1]]
    body = None
    if parts and len(complete) == len(parts):
        body = Body(complete, list(model.layers_to_capture))
    _bodies[id(model)] = (model, body)
    return body


def _plain(model: Any) -> bool:
    """Whether all of it is here, and layers of the kind that ``layer.py`` knows."""
    return (
        model.pp_group.world_size == 1
        and model.start_layer == 0
        and model.end_layer == len(model.layers)
        and all(type(one).__name__ == "LlamaDecoderLayer" for one in model.layers)
        and layer.plain_norm(model.norm)
        and 0 not in model.layers_to_capture
    )


def target_body(
    model: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    input_embeds: torch.Tensor | None = None,
    pp_proxy_tensors: Any = None,
) -> Any:
    """``llama.LlamaModel.forward``: see ``upstream.Beside``."""
    entry = _bodies.get(id(model))
    if pp_proxy_tensors is not None or (entry is not None and entry[1] is None):
        return None
    if input_embeds is None:
        input_embeds = model.embed_tokens(input_ids)
    return _run(model, positions, forward_batch, input_embeds)


def _run(
    model: Any,
    positions: torch.Tensor,  # [rows] int64
    forward_batch: Any,
    x: torch.Tensor,  # [rows, hidden]
) -> Any:
    """[rows, hidden] for the head, with the captured states where there are any; or None, with
    nothing done."""
    backend, slots = layer.backend_of_this_forward(), forward_batch.out_cache_loc
    if backend is None or slots is None or not layer.covers(positions, slots, x):
        return None
    body = _body(model, x, backend.token_to_kv_pool)
    plan = layer.plan_of(backend, forward_batch) if body is not None else None
    if body is None or plan is None:
        return None
    library: Any = native.library()
    residual, out, count = x, torch.empty_like(x), x.shape[0]
    states = []
    for begin, end in body.groups:
        if begin in body.captured:
            states.append(x + residual)
        library.aurora_layers(
            body.address(begin), end - begin, plan.address, positions.data_ptr(),
            slots.data_ptr(), count, x.data_ptr(), residual.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        x = out
    normed, _ = fused.add_and_norm(model.norm, x, residual)
    return (normed, states) if states else normed
