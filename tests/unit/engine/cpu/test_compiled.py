"""The compiled CPU kernels against float64 definitions, and machines that can't have them."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aurora_sgl.config import get_settings
from aurora_sgl.engine.cpu import attention, compiled_attention, fused, native
from tests.support import SUPPORT

DTYPES = [torch.float32, torch.bfloat16]
# Half of a unit in the last place of what is stored, and what float32 sums lose.
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-6},
}

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """Loaded once for all: to look for the file asks the compiler for its version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CPU_COMPILED", "1")
        get_settings.cache_clear()
        native.library.cache_clear()
        yield
    get_settings.cache_clear()
    native.library.cache_clear()


def _near(got: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), exact, **TOLERANCE[got.dtype])


def _columns(rows: int, width: int, dtype: torch.dtype, strided: bool) -> torch.Tensor:
    """Random rows; strided ones are a slice of wider rows, as SGLang's q, k and v are."""
    if not strided:
        return torch.randn(rows, width).to(dtype)
    return torch.randn(rows, width + 24).to(dtype)[:, 8 : 8 + width]


@needs_compiler
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("width", [1, 37, 576])
def test_a_norm_equals_the_definition_with_and_without_a_residual(width, rows, dtype, strided):
    torch.manual_seed(width + rows)
    x, residual = (_columns(rows, width, dtype, strided) for _ in range(2))
    weight = torch.randn(width).to(dtype)

    def exact(of: torch.Tensor) -> torch.Tensor:
        return of * torch.rsqrt(of.square().mean(-1, keepdim=True) + 1e-5) * weight.double()

    before = x.clone()
    out = fused.norm(x, None, weight, 1e-5)
    assert out is not None and torch.equal(x, before)
    _near(out, exact(x.double()))
    total = (x.float() + residual.float()).double()
    out = fused.norm(x, residual, weight, 1e-5)
    assert out is x
    _near(out, exact(total))
    assert torch.equal(residual, total.float().to(dtype))


@needs_compiler
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (3, 37), (2, 1536)])
def test_the_activation_equals_the_definition_at_every_magnitude(rows, width, dtype, strided):
    torch.manual_seed(rows)
    x = _columns(rows, 2 * width, dtype, strided)
    x *= torch.logspace(-3, 2, 2 * width).to(dtype)
    x[: rows // 2, 0], x[: rows // 2, -1] = -200.0, 200.0
    gate, up = x.double().chunk(2, -1)
    out = fused.silu_times(x)
    assert out is not None
    _near(out, F.silu(gate) * up)


@needs_compiler
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("head", "rotary_dim"), [(64, 64), (10, 6), (80, 32)])
@pytest.mark.parametrize(
    ("dtype", "table_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_rotary_embedding_equals_the_definition(
    dtype, table_dtype, head, rotary_dim, neox, strided
):
    torch.manual_seed(head)
    tokens, positions = 5, torch.tensor([0, 3, 3, 40, 99])
    angles = torch.outer(torch.arange(100.0), 10.0 ** -torch.linspace(0, 2, rotary_dim // 2))
    table = torch.cat([angles.cos(), angles.sin()], -1).to(table_dtype)
    q, k = (_columns(tokens, n * head, dtype, strided) for n in (3, 1))
    wanted = []
    for x in (q, k):
        y = x.double().view(tokens, -1, head).clone() if not strided else (
            x.double().reshape(tokens, -1, head).clone()
        )  # fmt: skip
        cos, sin = table[positions].double().chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        part = y[..., :rotary_dim]
        if neox:
            a, b = part.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = part[..., ::2], part[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        y[..., :rotary_dim] = turned
        wanted.append(y.reshape(tokens, -1))
    assert fused.rotate(positions, q, k, table, head, rotary_dim, neox)
    for got, exact in zip((q, k), wanted, strict=True):
        torch.testing.assert_close(
            got.double(), exact, rtol=TOLERANCE[dtype]["rtol"], atol=1e-6 * 10
        )


@needs_compiler
def test_tensors_that_the_kernels_do_not_cover_are_left_to_pytorch():
    half = torch.randn(2, 8).half()
    assert fused.norm(half, None, torch.ones(8).half(), 1e-5) is None
    x = torch.randn(2, 8)
    assert fused.norm(x, None, torch.ones(8).bfloat16(), 1e-5) is None
    assert fused.norm(x, x[:1], torch.ones(8), 1e-5) is None
    assert fused.norm(torch.randn(2, 3, 8), None, torch.ones(8), 1e-5) is None
    assert fused.norm(torch.randn(8, 2).t(), None, torch.ones(8), 1e-5) is None
    assert fused.silu_times(half) is None
    assert fused.silu_times(torch.randn(2, 3, 8)) is None
    table = torch.randn(9, 8)
    assert not fused.rotate(torch.tensor([[1, 2]]), x, x.clone(), table, 8, 8, True)
    assert not fused.rotate(torch.tensor([1, 2]), x, x.clone(), table.half(), 8, 8, True)


def _case(new: list[int], old: list[int], heads: int, kv_heads: int, dim: int, value_dim: int):
    """Random queries, a shuffled pool, and the table that names its slots."""
    totals = [n + o for n, o in zip(new, old, strict=True)]
    slots = sum(totals) + 3
    table = torch.zeros(len(new) + 1, max(totals, default=0) + 5, dtype=torch.int32)
    free = torch.randperm(slots).to(torch.int32)
    rows = torch.randperm(len(new) + 1)[: len(new)]
    at = 0
    for row, total in zip(rows.tolist(), totals, strict=True):
        table[row, :total] = free[at : at + total]
        at += total
    keys, values = torch.randn(slots, kv_heads, dim), torch.randn(slots, kv_heads, value_dim)
    return torch.randn(sum(new), heads, dim), keys, values, table, rows, torch.tensor(totals)


def _exact(q, keys, values, table, rows, totals, new, *, window, cap, tree, causal):
    """The definition in float64, query by query."""
    out = []
    at = 0
    groups = q.shape[1] // keys.shape[1]
    for r, (row, total, fresh) in enumerate(zip(rows.tolist(), totals.tolist(), new, strict=True)):
        where = table[row, :total].long()
        k = keys[where].double().repeat_interleave(groups, 1)
        v = values[where].double().repeat_interleave(groups, 1)
        place = torch.arange(total)
        for i in range(fresh):
            position = total - fresh + i
            seen = place <= position if causal else torch.ones(total, dtype=torch.bool)
            if tree is not None:
                seen = torch.cat([torch.ones(total - fresh, dtype=torch.bool), tree[r, i]])
            if window:
                seen &= place > position - window
            logits = torch.einsum("hd,lhd->hl", q[at].double(), k) * q.shape[2] ** -0.5
            if cap:
                logits = cap * torch.tanh(logits / cap)
            weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
            out.append(torch.einsum("hl,lhd->hd", weights, v))
            at += 1
    return torch.stack(out)


SHAPES = [(9, 3, 64, 64), (4, 4, 8, 8), (6, 2, 80, 48), (8, 1, 128, 128)]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (70, 0.0), (5, 30.0)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("new", "old", "kind"),
    [
        ([1], [0], "causal"),
        ([5, 1, 40, 3], [0, 63, 130, 64], "causal"),
        ([64, 33], [1, 200], "causal"),
        ([8, 8, 8], [0, 57, 190], "tree"),
        ([6, 2], [10, 65], "all"),
    ],
)
def test_compiled_attention_equals_the_definition(new, old, kind, shape, window, cap, dtype):
    torch.manual_seed(sum(new))
    heads, kv_heads, dim, value_dim = shape
    q, keys, values, table, rows, totals = _case(new, old, heads, kv_heads, dim, value_dim)
    q, keys, values = q.to(dtype), keys.to(dtype), values.to(dtype)
    tree = None
    if kind == "tree":
        tree = (torch.rand(len(new), new[0], new[0]) < 0.4).tril()
        tree |= torch.eye(new[0], dtype=torch.bool)
        tree[1] = tree[1].flip(0).flip(1).tril() | tree[1]
    wide = torch.randn(q.shape[0], heads * dim + 16).to(dtype)  # rows of a wider tensor
    wide[:, 16:] = q.flatten(1)
    out = torch.empty(q.shape[0], heads, value_dim, dtype=dtype)
    starts = torch.tensor([sum(new[:i]) for i in range(len(new))])
    attention.begin_forward()
    attention.extend_attention_cpu(
        wide[:, 16:].view(-1, heads, dim), None, None, out, keys, values, 1.0, 1.0, table, rows,
        totals, torch.tensor(new, dtype=torch.int32), starts.to(torch.int32), max(new), dim**-0.5,
        cap, False, window, None, None, tree.flatten() if tree is not None else None,
        kind != "all",
    )  # fmt: skip
    assert any(isinstance(p, compiled_attention.ForwardPlan) for p in attention._plans.values())
    wanted = _exact(
        q, keys, values, table, rows, totals, new, window=window, cap=cap, tree=tree,
        causal=kind != "all",
    )  # fmt: skip
    error = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(out.double(), wanted, **error)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_compiled_decoding_sees_the_token_that_it_has_just_stored(batch, dtype):
    torch.manual_seed(batch)
    old = [(37 * i) % 150 for i in range(batch)]
    q, keys, values, table, rows, totals = _case([1] * batch, old, 9, 3, 64, 64)
    q, keys, values = q.to(dtype), keys.to(dtype), values.to(dtype)
    qkv = torch.randn(batch, 5 * 192).to(dtype)
    k, v = qkv[:, 576:768], qkv[:, 768:]
    slots = torch.stack([table[r, t - 1] for r, t in zip(rows, totals, strict=True)]).long()
    out = torch.empty_like(q)
    attention.begin_forward()
    attention.decode_attention_cpu(
        q, keys, values, 1.0, 1.0, out, k, v, slots, torch.empty(0), table, rows, totals,
        64**-0.5, 0.0,
    )  # fmt: skip
    assert torch.equal(keys[slots].flatten(1), k) and torch.equal(values[slots].flatten(1), v)
    wanted = _exact(
        q, keys, values, table, rows, totals, [1] * batch, window=0, cap=0.0, tree=None, causal=True
    )
    error = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(out.double(), wanted, **error)


@needs_compiler
def test_300_requests_at_once_on_two_threads_equal_one_thread():
    torch.manual_seed(0)
    new, old = [4] * 300, [(13 * i) % 97 for i in range(300)]
    q, keys, values, table, rows, totals = _case(new, old, 6, 2, 16, 16)
    starts = torch.arange(300, dtype=torch.int32) * 4

    def run() -> torch.Tensor:
        out = torch.empty_like(q)
        attention.begin_forward()
        attention.extend_attention_cpu(
            q, None, None, out, keys, values, 1.0, 1.0, table, rows, totals, torch.tensor(new),
            starts, 4, 0.25, 0.0,
        )  # fmt: skip
        return out

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        assert torch.equal(run(), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of compiled kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def test_without_a_compiler_one_line_says_so_and_pytorch_serves(
    elsewhere, tmp_path, monkeypatch, caplog
):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING, "aurora_sgl"):
        for _ in range(3):
            assert native.library() is None
    assert [r.message for r in caplog.records] == [
        "aurora: no C++ compiler: small operations stay in PyTorch, which is slower"
    ]
    assert fused.norm(torch.ones(1, 4), None, torch.ones(4), 1e-5) is None
    q, keys, values, table, rows, totals = _case([2, 2], [3, 9], 4, 2, 8, 8)
    out = torch.empty_like(q)
    attention.begin_forward()
    attention.extend_attention_cpu(
        q, None, None, out, keys, values, 1.0, 1.0, table, rows, totals, torch.tensor([2, 2]),
        torch.tensor([0, 2]), 2, 8**-0.5, 0.0,
    )  # fmt: skip
    wanted = _exact(
        q, keys, values, table, rows, totals, [2, 2], window=0, cap=0.0, tree=None, causal=True
    )
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_source_that_does_not_compile_is_one_line_with_the_compilers_words(
    elsewhere, tmp_path, monkeypatch, caplog
):
    broken = tmp_path / "kernels.cpp"
    broken.write_text("this is not C++\n")
    monkeypatch.setattr(native, "SOURCE", broken)
    with caplog.at_level(logging.WARNING, "aurora_sgl"):
        assert native.library() is None
    assert len(caplog.records) == 1 and "did not compile" in caplog.text and "\n" not in (
        caplog.records[0].getMessage()
    )  # fmt: skip
    assert list(native.cache_folder().iterdir()) == []


@pytest.mark.process
@needs_compiler
def test_kernels_are_compiled_once_by_however_many_start_together(elsewhere, tmp_path, monkeypatch):
    """Of a short source; that ours compiles is seen by all tests here."""
    source = tmp_path / "kernels.cpp"
    source.write_text('extern "C" int aurora_version() { return 1; }\n')
    monkeypatch.setattr(native, "SOURCE", source)
    slow = tmp_path / "slow-c++"  # all have begun before the first is done
    slow.write_text(
        f'#!/bin/sh\ncase "$1" in --version) ;; *) echo >> {tmp_path}/calls; sleep 1;; esac\n'
        f'exec {native.compiler()} "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    said: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: native.build(said.append), range(3)))
    assert len(set(made)) == 1 and made[0] is not None and made[0].exists()
    assert [p.name for p in native.cache_folder().iterdir()] == [made[0].name]
    assert (tmp_path / "calls").read_text() == "\n", "compiled once"
    assert [line.split()[0] for line in said] == ["compiling", "compiled"]
    said.clear()
    assert native.build(said.append) == made[0]
    assert said == []


@needs_compiler
@pytest.mark.slow
def test_sglangs_own_layers_give_the_same_through_the_hooks():
    script = SUPPORT / "sglang_layers.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all equal"
