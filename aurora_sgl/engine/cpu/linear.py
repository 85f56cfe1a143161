"""bfloat16 linear layers on CPU through oneDNN weights that are packed once.

``F.linear`` reorders its weight at every call. With the weight packed beforehand the same product,
bit for bit, took half of the time for up to 8 rows and 0.73 of it for 32 (SmolLM2-135M's layers,
AVX-512 bfloat16, one thread). SGLang's own switch for packed weights, ``use_intel_amx_backend`` on
the layer, leads its layers and its logits processor here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

KERNELS = ("weight_packed_linear",)

_ROWS_HINT = 4  # what a verify step has; measured to be no worse at 1 to 512 rows

_packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # address -> (weight, packed weight)


def supported() -> bool:
    """Whether this machine has bfloat16 kernels in oneDNN."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] in oneDNN's own layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)  # type: ignore[no-any-return]


def replace(weight: torch.Tensor, packed: torch.Tensor) -> None:
    """Use ``packed`` for ``weight``, whose values have just been changed in place."""
    if weight.data_ptr() in _packed:
        _packed[weight.data_ptr()] = (weight, packed)


def uses(weight: torch.Tensor) -> bool:
    """Whether a packed copy of this weight is in use."""
    return weight.data_ptr() in _packed


def forget() -> None:
    """Pack anew at the next use: weights were changed in place by somebody else."""
    _packed.clear()


def mark(layer: torch.nn.Module) -> None:
    """Have SGLang call :func:`weight_packed_linear` for this layer, if its weight is bfloat16."""
    weight = getattr(layer, "weight", None)
    if weight is not None and weight.dtype == torch.bfloat16 and weight.dim() == 2 and supported():
        layer.use_intel_amx_backend = True  # type: ignore[assignment]


def weight_packed_linear(
    x: torch.Tensor,  # [rows, in] bfloat16
    weight: torch.Tensor,  # [out, in] bfloat16
    bias: torch.Tensor | None,
    is_vnni: bool,
) -> torch.Tensor:  # [rows, out]
    """``F.linear`` with the weight packed at its first use."""
    if x.dtype != torch.bfloat16 or x.shape[0] == 0:
        return F.linear(x, weight, bias)
    known = _packed.get(weight.data_ptr())
    if known is None:
        known = _packed[weight.data_ptr()] = (weight, pack(weight))
    return torch.ops.mkldnn._linear_pointwise(x, known[1], bias, "none", [], "")  # type: ignore[no-any-return]
