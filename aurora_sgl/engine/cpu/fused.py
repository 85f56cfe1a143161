"""Norms, rotary embedding and activation of SGLang's layers, each as one compiled call on CPU.

SGLang without AMX runs them as ten to twenty PyTorch operations of a few microseconds each, which
took 20% of a decode step of SmolLM2-135M. As on its CUDA path, a norm with a residual and the
rotary embedding work in place. The functions return None, with nothing done, for tensors that the
compiled kernels do not cover; the hooks then go on with SGLang's native ones.
"""

from __future__ import annotations

from typing import Any

import torch

from aurora_sgl.engine.cpu import native

_KINDS = native.KINDS


def _rows(x: torch.Tensor) -> bool:
    """Whether x is [rows, width] with its elements side by side."""
    return x.dim() == 2 and x.stride(1) == 1


def norm(
    x: torch.Tensor,  # [rows, hidden]
    residual: torch.Tensor | None,  # [rows, hidden]
    weight: torch.Tensor,  # [hidden]
    eps: float,
) -> torch.Tensor | None:  # [rows, hidden]
    """``x / sqrt(mean(x^2) + eps) * weight``, computed in float32.

    With a residual: ``residual += x`` first; the norm of that sum replaces x and is returned.
    """
    library = native.library()
    kind = _KINDS.get(x.dtype)
    if library is None or kind is None or weight.dtype != x.dtype or not _rows(x):
        return None
    rows, width = x.shape
    if width != weight.shape[0] or not weight.is_contiguous():
        return None
    if residual is None:
        out = torch.empty((rows, width), dtype=x.dtype)
        residual_at, residual_stride = None, 0
    elif residual.shape == x.shape and residual.dtype == x.dtype and _rows(residual):
        out = x
        residual_at, residual_stride = residual.data_ptr(), residual.stride(0)
    else:
        return None
    library.aurora_rmsnorm(
        kind, x.data_ptr(), residual_at, weight.data_ptr(), out.data_ptr(), rows, width,
        x.stride(0), residual_stride, out.stride(0), eps,
    )  # fmt: skip
    return out


def add_and_norm(
    layer: Any,  # SGLang's RMSNorm
    x: torch.Tensor,  # [rows, hidden]
    residual: torch.Tensor,  # [rows, hidden]
) -> tuple[torch.Tensor, torch.Tensor]:  # both [rows, hidden]: the norm of the sum, the sum
    """What the layer makes of both, compiled where that covers them; in place then."""
    out = norm(x, residual, layer.weight, layer.variance_epsilon)
    return layer(x, residual) if out is None else (out, residual)


def silu_times(x: torch.Tensor) -> torch.Tensor | None:
    """``silu(x[:, :w]) * x[:, w:]`` for x [rows, 2 w]: [rows, w], computed in float32."""
    library = native.library()
    kind = _KINDS.get(x.dtype)
    if library is None or kind is None or not _rows(x) or x.shape[1] % 2:
        return None
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype)
    library.aurora_silu_and_mul(kind, x.data_ptr(), out.data_ptr(), rows, width, x.stride(0))
    return out


def rotate(
    positions: torch.Tensor,  # [tokens] int64
    query: torch.Tensor,  # [tokens, heads * head], rotated in place
    key: torch.Tensor,  # [tokens, key heads * head], rotated in place
    table: torch.Tensor,  # [positions, rotary_dim]: cosines, then sines
    head: int,
    rotary_dim: int,
    neox: bool,  # pairs are (i, i + rotary_dim / 2), else (2 i, 2 i + 1)
) -> bool:
    """Rotate the first ``rotary_dim`` of every head by its position's angles; False: not done."""
    library = native.library()
    kind, table_kind = _KINDS.get(query.dtype), _KINDS.get(table.dtype)
    if (
        library is None
        or kind is None
        or table_kind is None
        or key.dtype != query.dtype
        or not (_rows(query) and _rows(key))
        or positions.dim() != 1
        or positions.dtype != torch.int64
        or not (positions.is_contiguous() and table.is_contiguous())
    ):
        return False
    library.aurora_rotary(
        kind, table_kind, query.data_ptr(), key.data_ptr(), table.data_ptr(), table.shape[0],
        positions.data_ptr(), positions.shape[0], query.shape[1] // head, key.shape[1] // head,
        head, rotary_dim, query.stride(0), key.stride(0), neox,
    )  # fmt: skip
    return True


# -- hooks: see upstream.Beside -------------------------------------------------------------------


def plain_norm(layer: Any) -> bool:
    """Whether this RMSNorm has none of the variants that the compiled one lacks."""
    return not (
        layer.cast_x_before_out_mul
        or layer.variance_size_override is not None
        or layer.fp32_residual
        or layer.override_orig_dtype is not None
    )


def rms_norm(
    layer: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: Any = None,  # SGLang's native function does nothing with it
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
    """``RMSNorm.forward_native``."""
    if post_residual_addition is not None or not plain_norm(layer):
        return None
    out = norm(x, residual, layer.weight, layer.variance_epsilon)
    return out if out is None or residual is None else (out, residual)


def silu_and_mul(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """``SiluAndMul.forward_native``."""
    return silu_times(x)


def rotary(
    layer: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``RotaryEmbedding.forward_native``."""
    if (
        offsets is not None
        or fused_set_kv_buffer_arg is not None
        or hasattr(layer, "sin_cos_cache")
    ):
        return None
    done = rotate(
        positions, query, key, layer.cos_sin_cache, layer.head_size, layer.rotary_dim,
        layer.is_neox_style,
    )  # fmt: skip
    return (query, key) if done else None
