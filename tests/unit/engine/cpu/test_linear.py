"""Linear layers on CPU: the compiled kernel by the definition, and which way is chosen when."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aurora_sgl.config import get_settings
from aurora_sgl.engine.cpu import linear, native, packed

DTYPES = [torch.float32, torch.bfloat16]

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AURORA_CPU_COMPILED", "1")
    _anew()
    yield
    monkeypatch.undo()
    _anew()


def _anew() -> None:
    get_settings.cache_clear()
    native.library.cache_clear()
    linear.choose.cache_clear()
    linear.forget()


def _exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def _check(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """Half a unit in the last place of what is stored, and what float32 sums may lose."""
    exact = _exact(x, weight, bias)
    sums = 1e-6 * F.linear(x.double().abs(), weight.double().abs())
    stored = 2**-8 if got.dtype == torch.bfloat16 else 2**-23
    assert bool(((got.double() - exact).abs() <= exact.abs() * stored + sums).all())


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 97, 200])
@pytest.mark.parametrize(("width", "outs"), [(1, 1), (33, 7), (576, 64), (200, 130)])
def test_the_kernel_equals_the_definition_for_any_size(width, outs, rows, with_bias, dtype):
    torch.manual_seed(width + rows)
    x = torch.randn(rows, width + 8).to(dtype)[:, 8:]  # rows of a wider tensor
    weight = torch.randn(outs, width).to(dtype)
    bias = torch.randn(outs).to(dtype) if with_bias else None
    assert linear.fits(x, weight, bias)
    _check(linear.own(x, weight, bias), x, weight, bias)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_one_result_in_whatever_company(dtype):
    """So a token that is verified among others gets the logits that it would get alone."""
    torch.manual_seed(0)
    x, weight = torch.randn(100, 300).to(dtype), torch.randn(90, 300).to(dtype)
    alone = torch.cat([linear.own(x[i : i + 1], weight, None) for i in range(len(x))])
    for rows in (2, 3, 4, 5, 6, 8, 16, 100):
        assert torch.equal(linear.own(x[:rows], weight, None), alone[:rows])


@needs_compiler
def test_values_that_are_not_finite_stay_so():
    x = torch.ones(1, 4).bfloat16()
    weight = torch.tensor([[1.0, 1, 1, float("nan")], [1, 1, 1, float("inf")]]).bfloat16()
    got = linear.own(x, weight, None)
    assert got[0, 0].isnan() and got[0, 1].isinf()


@needs_compiler
def test_two_threads_compute_what_one_does():
    x, weight = torch.randn(9, 1024).bfloat16(), torch.randn(2050, 1024).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = linear.own(x, weight, None)
        torch.set_num_threads(2)
        assert torch.equal(linear.own(x, weight, None), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.process
@needs_compiler
@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3"])
def test_builds_for_lesser_processors_give_the_same(tmp_path: Path, monkeypatch, target):
    """What a machine without AVX-512, or without AVX, would run."""
    import platform

    if platform.machine() != "x86_64":
        pytest.skip("flags of x86-64")
    flags = tuple(f"-march={target}" if f.startswith("-march") else f for f in native._FLAGS)
    made = tmp_path / "lesser.so"
    command = [native.compiler() or "", *flags, str(native.SOURCE), "-o", str(made)]
    subprocess.run(command, check=True, timeout=300)
    monkeypatch.setattr(native, "build", lambda say=None: made)
    native.library.cache_clear()
    for dtype in DTYPES:
        x, weight = torch.randn(7, 200).to(dtype), torch.randn(70, 200).to(dtype)
        _check(linear.own(x, weight, None), x, weight, None)
    assert linear._wrong() is None


@pytest.mark.parametrize("few", [linear.OWN, "onednn", "fbgemm", linear.TORCH])
@pytest.mark.parametrize("rows", [1, 4, 130])
def test_every_way_follows_weights_that_a_swap_changes(few, rows, monkeypatch):
    if few == linear.OWN and native.library() is None:
        pytest.skip("no C++ compiler")
    if few == "onednn" and not packed._has_onednn():
        pytest.skip("oneDNN has no bfloat16 on this machine")
    if few == "fbgemm" and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no FBGEMM in this PyTorch")
    monkeypatch.setattr(packed, "prefers_float16", lambda: few == "fbgemm")
    way = linear.PACKED if few in ("onednn", "fbgemm") else few
    monkeypatch.setattr(linear, "choose", lambda: linear.Choice(way, way, "told by the test"))
    torch.manual_seed(rows)
    weight, other = torch.randn(96, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    bias = torch.randn(96).bfloat16() if rows == 4 else None
    x = torch.randn(rows, 64).bfloat16()
    _near(linear.weight_packed_linear(x, weight, bias, True), x, weight, bias)
    assert linear.uses(weight) == (way == linear.PACKED)
    before = weight.data_ptr()
    weight.data = other.clone()  # as a swap does: other values at another address
    linear.moved(weight, before, packed.pack(other) if way == linear.PACKED else None)
    assert linear.uses(weight) == (way == linear.PACKED)
    _near(linear.weight_packed_linear(x, weight, bias, True), x, weight, bias)
    weight.mul_(2)
    linear.forget()
    _near(linear.weight_packed_linear(x, weight, bias, True), x, weight, bias)


def _near(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    exact = _exact(x, weight, bias)
    assert float((got.double() - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("scale", [1e30, 1e-9])
def test_weights_that_float16_can_not_hold_stay_in_bfloat16(scale, monkeypatch):
    monkeypatch.setattr(packed, "prefers_float16", lambda: True)
    weight = torch.randn(96, 64).bfloat16()
    weight[7] *= scale
    made = packed.pack(weight)
    assert made.fbgemm is None
    x = torch.randn(3, 64).bfloat16()
    torch.testing.assert_close(made(x, None), F.linear(x, weight))


@needs_compiler
def test_tensors_that_the_kernel_does_not_cover_go_to_pytorch(monkeypatch):
    choice = linear.Choice(linear.OWN, linear.OWN, "told by the test")
    monkeypatch.setattr(linear, "choose", lambda: choice)
    x = torch.randn(3, 64).bfloat16()
    wide = torch.randn(8, 128).bfloat16()[:, ::2]
    assert not linear.fits(x, wide, None)
    _check(linear.weight_packed_linear(x, wide, None, True), x, wide, None)
    turned = torch.randn(64, 3).bfloat16().t()
    assert not linear.fits(turned, wide, None)
    assert linear.weight_packed_linear(x[:0], wide, None, True).shape == (0, 8)
    # SGLang's logits of float32 rows with a bfloat16 head are PyTorch's business.
    assert not linear.fits(x.float(), wide.contiguous(), None)


@needs_compiler
def test_a_kernel_with_wrong_results_is_refused(monkeypatch):
    real = linear.own
    monkeypatch.setattr(linear, "own", lambda x, weight, bias: real(x, weight, bias) * 1.02)
    choice = linear.choose()
    assert linear.OWN not in (choice.few, choice.many)
    assert "refused" in choice.reason and "\n" not in choice.reason


@needs_compiler
def test_the_choice_is_made_once_and_said_in_one_line():
    choice = linear.choose()
    assert choice is linear.choose()
    assert choice.few in (linear.OWN, linear.PACKED, linear.TORCH)
    assert "times as fast" in choice.reason and "\n" not in choice.reason


@pytest.mark.parametrize(
    ("own", "packed", "way"),
    [(1.00, 0.92, "own"), (1.00, 0.85, "own"), (1.00, 0.75, "own"), (1.00, 0.60, "packed")],
)
def test_a_near_tie_is_ours_at_every_start(own: float, packed: float, way: str) -> None:
    times = {linear.TORCH: 2.8, linear.OWN: own, linear.PACKED: packed}
    for noise in (0.95, 1.0, 1.05):
        noisy = {**times, linear.PACKED: packed * noise}
        assert linear._fastest(noisy, linear._GAIN_FEW) == way


def test_without_compiled_kernels_pytorch_or_packed_weights_are_chosen(monkeypatch):
    monkeypatch.setenv("AURORA_CPU_COMPILED", "0")
    _anew()
    assert linear.choose().few != linear.OWN
    monkeypatch.setenv("AURORA_CPU_PACKED_WEIGHTS", "0")
    _anew()
    assert linear.choose().few == linear.choose().many == linear.TORCH
    layer = torch.nn.Linear(4, 4, bias=False).bfloat16()
    linear.mark(layer)
    assert not hasattr(layer, "use_intel_amx_backend")


def test_a_layer_that_sglang_leaves_to_pytorch_is_led_the_same_way():
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 64, bias=True).bfloat16()
    linear.route(layer)
    x = torch.randn(5, 96).bfloat16()
    with torch.no_grad():
        _near(layer(x), x, layer.weight, layer.bias)
        assert layer(x[None]).shape == (1, 5, 64)
        whole = layer.float()
        assert torch.equal(whole(x.float()), F.linear(x.float(), whole.weight, whole.bias))
