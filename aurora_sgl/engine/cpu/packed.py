"""Weights of bfloat16 linear layers, packed once in a library's own layout.

``F.linear`` reorders its weight at every call. With the weight packed beforehand by oneDNN the same
product, bit for bit, took half of the time for up to 8 rows and 0.73 of it for 32 (SmolLM2-135M's
layers, AVX-512 bfloat16, one thread).

Without bfloat16 in the CPU, oneDNN's kernels take several times as long as float32 from 8 rows on.
There FBGEMM's kernels serve: weights in float16, activations and sums in float32, the result
rounded to bfloat16. At 1, 8, 64 and 256 rows that took 0.95, 0.40, 0.39 and 0.25 of the time of
oneDNN's (Ice Lake, one thread). bfloat16 weights are exact in float16 but for those near zero; a
layer in which that would matter stays with oneDNN.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from aurora_sgl.machine import cpu_flags, native_bfloat16

log = logging.getLogger(__name__)

_ROWS_HINT = 4  # what a verify step has; measured to be no worse at 1 to 512 rows
#: Largest error of a weight in float16 against the largest weight of its row: bfloat16's own half
#: unit in the last place.
_TOLERANCE = 2.0**-9


@dataclass(frozen=True)
class Packed:
    """A weight in a library's own layout: oneDNN's bfloat16 or FBGEMM's float16, or as it was where
    neither takes it."""

    weight: torch.Tensor | None = None
    onednn: torch.Tensor | None = None
    fbgemm: Any = None  # torch.ScriptObject

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.weight is not None:
            product = F.linear(x, self.weight, bias)
        elif self.onednn is not None:
            product = torch.ops.mkldnn._linear_pointwise(x, self.onednn, bias, "none", [], "")
        else:
            product = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.fbgemm)
            product = (product if bias is None else product.add_(bias)).to(x.dtype)
        return product


def supported() -> bool:
    """Whether this machine has either library's kernels."""
    return _has_onednn() or prefers_float16()


def _has_onednn() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prefers_float16() -> bool:
    """Whether FBGEMM's float16 kernels are the faster ones here."""
    return (
        not native_bfloat16()
        and "avx2" in cpu_flags()
        and "fbgemm" in torch.backends.quantized.supported_engines
    )


def pack(weight: torch.Tensor) -> Packed:
    """The weight [out, in] for the fastest kernels that keep to bfloat16's own error."""
    weight = weight.detach()
    if prefers_float16():
        if _fits_float16(weight):
            return Packed(fbgemm=torch.ops.quantized.linear_prepack_fp16(weight.float(), None))
        log.info("a weight of shape %s does not fit float16", tuple(weight.shape))
    if not _has_onednn():
        return Packed(weight=weight)
    return Packed(onednn=torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT))


def _fits_float16(weight: torch.Tensor) -> bool:
    error = (weight.half().float() - weight.float()).abs().amax(1)
    return bool((error <= _TOLERANCE * weight.float().abs().amax(1)).all())
