"""bfloat16 linear layers on CPU: which of three ways is fastest on this machine, and those ways.

``own``: our compiled kernel (``linear.h``), which reads the weight where it lies. ``packed``: a
library's kernel with a copy of the weight in its layout (``packed.py``). ``torch``: ``F.linear``,
which lays the weight out anew at every call. What wins depends on the processor's instructions and
the compiler, so :func:`choose` times all three at start, for few rows and for many, and checks our
kernel's result. SGLang's own switch for packed weights, ``use_intel_amx_backend`` on the layer,
leads its layers and its logits processor here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from aurora_sgl.config import get_settings
from aurora_sgl.engine.cpu import native
from aurora_sgl.engine.cpu.packed import Packed, pack, supported

KERNELS = ("weight_packed_linear",)

logger = logging.getLogger("aurora_sgl")

OWN, PACKED, TORCH = "own", "packed", "torch"
FEW = 32  # rows up to which the choice for few rows holds
#: How much faster another way must be than ours. For few rows ours makes whole layers one compiled
#: call (``layer.py``), which the timings below do not see: weights packed by FBGEMM were 1.1 times
#: as fast for 1 and 8 rows alone, and 0.65 and 0.81 as fast in a server with 1 and 8 streams
#: (SmolLM2-135M, EPYC). Choices that flip from start to start made servers differ by half.
_GAIN_FEW, _GAIN_MANY = 1.5, 1.15

_packed: dict[int, tuple[torch.Tensor, Packed]] = {}  # address -> (weight, packed weight)


@dataclass(frozen=True)
class Choice:
    """How bfloat16 linear layers are computed on this machine."""

    few: str  # own | packed | torch, up to FEW rows
    many: str  # the same, for more rows
    reason: str  # for the log


def own(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` for x [rows, in] and weight [out, in] of one dtype, by the compiled kernel."""
    rows, outs = x.shape[0], weight.shape[0]
    y = torch.empty((rows, outs), dtype=x.dtype)
    library: Any = native.library()
    library.aurora_linear(
        native.KINDS[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(), outs, rows, x.shape[1], outs,
    )  # fmt: skip
    return y


def fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether :func:`own` covers these tensors."""
    return (
        x.dim() == 2
        and x.stride(1) == 1
        and weight.is_contiguous()
        and weight.dtype == x.dtype
        and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
    )


def moved(weight: torch.Tensor, before: int, packed: Packed | None) -> Packed | None:
    """``weight`` has other values now, and perhaps another address than ``before``.

    From now on ``packed`` is used for it; without, it is packed at the next use. Returns the packed
    copy of before, which the caller lets go of when there is time.
    """
    entry = _packed.pop(before, None)
    if entry is not None and packed is not None:
        _packed[weight.data_ptr()] = (weight, packed)
    return None if entry is None else entry[1]


def uses(weight: torch.Tensor) -> bool:
    """Whether a packed copy of this weight is in use."""
    return weight.data_ptr() in _packed


def forget() -> None:
    """Pack anew at the next use: weights were changed in place by somebody else."""
    _packed.clear()


def mark(layer: torch.nn.Module) -> None:
    """Have SGLang call :func:`weight_packed_linear` for this layer, if its weight is bfloat16."""
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dtype != torch.bfloat16 or weight.dim() != 2:
        return
    if choose().few != TORCH:
        layer.use_intel_amx_backend = True  # type: ignore[assignment]


def route(layer: torch.nn.Linear) -> None:
    """The same for a layer that SGLang leaves to PyTorch, such as a drafter's first projection."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2 or x.dtype != torch.bfloat16:
            return F.linear(x, layer.weight, layer.bias)
        return weight_packed_linear(x, layer.weight, layer.bias, True)

    layer.forward = forward  # type: ignore[method-assign, assignment]


def weight_packed_linear(
    x: torch.Tensor,  # [rows, in] bfloat16
    weight: torch.Tensor,  # [out, in] bfloat16
    bias: torch.Tensor | None,
    is_vnni: bool,
) -> torch.Tensor:  # [rows, out]
    """``F.linear`` in the way that was chosen for this many rows."""
    if x.dtype != torch.bfloat16 or x.shape[0] == 0:
        return F.linear(x, weight, bias)
    choice = choose()
    way = choice.few if x.shape[0] <= FEW else choice.many
    if way == OWN and fits(x, weight, bias):
        return own(x, weight, bias)
    if way == PACKED:
        entry = _packed.get(weight.data_ptr())
        if entry is None:
            entry = _packed[weight.data_ptr()] = (weight, pack(weight))
        return entry[1](x, bias)
    return F.linear(x, weight, bias)


# -- the choice ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def choose() -> Choice:
    """The fastest ways on this machine; timed at the first call, which takes about 0.3 s."""
    settings = get_settings()
    candidates: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {}
    weights = [torch.full((1536, 1536), 0.5, dtype=torch.bfloat16) for _ in range(8)]
    candidates[TORCH] = lambda x, index: F.linear(x, weights[index])
    if settings.cpu_packed_weights and supported():
        packed = [pack(weight) for weight in weights]
        candidates[PACKED] = lambda x, index: packed[index](x, None)
    wrong = _wrong() if native.library() is not None else None
    if native.library() is not None and wrong is None:
        candidates[OWN] = lambda x, index: own(x, weights[index], None)
    times = {
        rows: {name: _best(work, rows, count) for name, work in candidates.items()}
        for rows, count in ((1, len(weights)), (8, len(weights)), (2 * FEW, 2))
    }
    few = {name: times[1][name] + times[8][name] for name in candidates}
    best = _fastest(few, _GAIN_FEW)
    many = times[2 * FEW]
    if best != PACKED:  # a copy for prefills alone is not worth its memory
        many = {name: took for name, took in many.items() if name != PACKED}
    gain = few[TORCH] / few[best]
    note = f"{_NAMES[best]}, {gain:.1f} times as fast as PyTorch's"
    if wrong is not None:
        note += f"; the compiled one was refused: {wrong}"
    return Choice(best, _fastest(many, _GAIN_MANY), note)


_NAMES = {
    OWN: "compiled, weights in place",
    PACKED: "a library's, with packed weights",
    TORCH: "PyTorch",
}


def _fastest(times: dict[str, float], gain: float) -> str:
    return min(times, key=lambda name: times[name] * (1.0 if name == OWN else gain))


def _best(work: Callable[[torch.Tensor, int], torch.Tensor], rows: int, weights: int) -> float:
    """The shortest of three rounds over all weights, which no second-level cache holds."""
    x = torch.full((rows, 1536), 0.5, dtype=torch.bfloat16)
    shortest = float("inf")
    for _ in range(3):
        begun = time.thread_time()  # others may be running on this machine
        for index in range(weights):
            work(x, index)
        shortest = min(shortest, time.thread_time() - begun)
    return shortest


def _wrong() -> str | None:
    """What is wrong with the compiled kernel's results; None: they are right.

    Its inner loop differs by processor, and not every kind was at hand when it was written.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, width, outs in ((1, 576, 70), (7, 200, 9), (8, 1536, 64)):
        x = torch.randn(rows, width, generator=generator).bfloat16()
        weight = torch.randn(outs, width, generator=generator).bfloat16()
        exact = x.double() @ weight.double().T
        # Half a unit in the last place of what is stored, and float32 sums of `width` terms.
        allowed = exact.abs() * 2**-8 + 1e-6 * (x.double().abs() @ weight.double().abs().T)
        got = own(x, weight, None)
        if not bool(((got.double() - exact).abs() <= allowed).all()):
            return "a product of it differs from the definition"
        if not torch.equal(got[-1:], own(x[-1:], weight, None)):
            return "a row's product depends on the other rows"
    return None
