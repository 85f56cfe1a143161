"""Run by test_cpu_compiled: SGLang's own layers, natively and through our hooks around them."""

from __future__ import annotations

import functools
import itertools

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import torch  # noqa: E402
from sglang.srt.layers.activation import SiluAndMul  # noqa: E402
from sglang.srt.layers.layernorm import RMSNorm  # noqa: E402
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402

from aurora_sgl.engine.cpu import fused  # noqa: E402
from aurora_sgl.engine.cpu.upstream import Beside  # noqa: E402

handed_back = 0
norm, activation, rotation = map(Beside, (fused.rms_norm, fused.silu_and_mul, fused.rotary))


@functools.wraps(RMSNorm.forward_native)
def native_norm(*args, **kw):
    global handed_back
    handed_back += 1
    return RMSNorm.forward_native(*args, **kw)


def same(got, wanted, dtype: torch.dtype) -> None:
    # SGLang's native functions round to bfloat16 in between; ours do so once, at the end.
    error = (
        {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 2e-2}
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, **error)


for dtype, rows in itertools.product([torch.float32, torch.bfloat16], [1, 6]):
    torch.manual_seed(rows)
    x, residual = torch.randn(rows, 96).to(dtype), torch.randn(rows, 96).to(dtype)
    for options in ({}, {"cast_x_before_out_mul": True}, {"fp32_residual": True}):
        layer = RMSNorm(96, eps=1e-5, **options).to(dtype)
        layer.weight.data.normal_()
        before = handed_back
        same([norm(native_norm, layer, x)], [RMSNorm.forward_native(layer, x)], dtype)
        same(
            norm(native_norm, layer, x.clone(), residual.clone()),
            RMSNorm.forward_native(layer, x, residual),
            dtype,
        )
        assert handed_back - before == (2 if options else 0), (options, handed_back)
    gate_up = torch.randn(rows, 128).to(dtype)
    same(
        [activation(SiluAndMul.forward_native, SiluAndMul(), gate_up)],
        [SiluAndMul.forward_native(SiluAndMul(), gate_up)],
        dtype,
    )
    for neox in (True, False):
        rotary = RotaryEmbedding(16, 16, 64, 10000, neox, dtype)
        q, k, _ = torch.randn(rows, 128).to(dtype).split([80, 32, 16], -1)
        positions = torch.arange(rows) * 7
        wanted = RotaryEmbedding.forward_native(rotary, positions, q, k)
        same(rotation(RotaryEmbedding.forward_native, rotary, positions, q, k), wanted, dtype)
print("all equal")
