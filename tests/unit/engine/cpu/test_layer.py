"""A decoder layer in one compiled call is, bit for bit, its operations one after the other."""

from __future__ import annotations

import ctypes
import logging
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_sgl.config import get_settings
from aurora_sgl.engine.cpu import attention, compiled_attention, fused, layer, linear, native
from aurora_sgl.engine.cpu.compiled_attention import ForwardPlan

HEADS, KV_HEADS, DIM, HIDDEN, INNER = 6, 2, 16, 96, 200

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AURORA_CPU_COMPILED", "1")
    get_settings.cache_clear()
    native.library.cache_clear()
    # What is fastest is timed, and differs between machines and moments.
    own = linear.Choice(linear.OWN, linear.OWN, "chosen by the test")
    monkeypatch.setattr(linear, "choose", lambda: own)
    yield
    monkeypatch.undo()
    get_settings.cache_clear()
    native.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angles_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["first", "later", "drafter"])
@pytest.mark.parametrize("new", [[1], [8, 8, 8], [3, 1, 7]])
def test_one_call_is_the_operations_one_by_one(new, kind, angles_dtype, dtype):
    torch.manual_seed(len(new))
    rows, width = sum(new), (HEADS + 2 * KV_HEADS) * DIM

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype) * 0.3

    qkv = make(width, HIDDEN * (2 if kind == "drafter" else 1))
    out, gate_up, down = make(HIDDEN, HEADS * DIM), make(2 * INNER, HIDDEN), make(HIDDEN, INNER)
    norm, second, post = make(HIDDEN), make(HIDDEN), make(HIDDEN)
    bias = make(width)
    angles = torch.randn(300, DIM).to(angles_dtype)
    totals = torch.tensor([n + 20 * i for i, n in enumerate(new)])
    table = torch.randperm(400).view(4, 100).to(torch.int32)
    keys, values = make(400, KV_HEADS, DIM), make(400, KV_HEADS, DIM)
    batch = torch.arange(len(new))
    at = [(r, t) for r, (n, total) in enumerate(zip(new, totals, strict=True))
          for t in range(int(total) - n, int(total))]  # fmt: skip
    positions = torch.tensor([t for _, t in at])
    slots = torch.stack([table[r, t] for r, t in at]).long()
    starts = torch.tensor([sum(new[:i]) for i in range(len(new))])
    plan = ForwardPlan(table, batch, totals, window=0, news=torch.tensor(new), starts=starts)
    x, embedded = make(rows, HIDDEN), make(rows, HIDDEN)
    residual = make(rows, HIDDEN) if kind == "later" else x

    struct = native.Layer(
        norm=norm.data_ptr(), second_norm=second.data_ptr(), qkv=qkv.data_ptr(),
        qkv_bias=bias.data_ptr(), o=out.data_ptr(), o_bias=None, post_norm=post.data_ptr(),
        gate_up=gate_up.data_ptr(), gate_up_bias=None, down=down.data_ptr(), down_bias=None,
        angles=angles.data_ptr(), hidden=HIDDEN, inner=INNER, heads=HEADS, kv_heads=KV_HEADS,
        dim=DIM, rotary_dim=DIM, positions=300, eps=1e-5, second_eps=1e-6, post_eps=1e-4,
        scale=DIM**-0.5, cap=0.0, kind=native.KINDS[dtype], angles_kind=native.KINDS[angles_dtype],
        neox=True,
    )  # fmt: skip
    own_keys, own_values = keys.clone(), values.clone()
    struct.keys, struct.values = own_keys.data_ptr(), own_values.data_ptr()
    own_x, own_embedded = x.clone(), embedded.clone()
    own_residual = residual.clone() if kind == "later" else own_x
    got = own_x if kind == "later" else torch.empty_like(x)
    native.library().aurora_layer(
        ctypes.addressof(struct), plan.address, positions.data_ptr(), slots.data_ptr(), rows,
        own_x.data_ptr(), own_residual.data_ptr(), got.data_ptr(),
        own_embedded.data_ptr() if kind == "drafter" else None,
    )  # fmt: skip

    if kind == "drafter":
        normed = torch.cat([fused.norm(embedded, None, norm, 1e-5), fused.norm(x, None, second, 1e-6)], 1)  # fmt: skip # noqa: E501
    elif kind == "first":
        normed = fused.norm(x, None, norm, 1e-5)
    else:
        normed = fused.norm(x, residual, norm, 1e-5)
    q, k, v = linear.own(normed, qkv, bias).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
    assert fused.rotate(positions, q, k, angles, DIM, DIM, True)
    keys[slots], values[slots] = k.view(rows, KV_HEADS, DIM), v.reshape(rows, KV_HEADS, DIM)
    attended = torch.empty(rows, HEADS, DIM, dtype=dtype)
    compiled_attention.attend(
        plan, q.view(rows, HEADS, DIM), attended, keys, values, DIM**-0.5, 0.0
    )
    after = fused.norm(linear.own(attended.flatten(1), out, None), residual, post, 1e-4)
    active = fused.silu_times(linear.own(after, gate_up, None))
    assert torch.equal(got, linear.own(active, down, None))
    assert torch.equal(own_residual, residual)
    assert torch.equal(own_keys, keys) and torch.equal(own_values, values)


def _sglang_layer(dtype: torch.dtype) -> SimpleNamespace:
    """What ``CompiledLayer`` reads of SGLang's layer, class names included."""

    def part(kind: str, *shape: int) -> Any:
        made = type(kind, (SimpleNamespace,), {})()
        made.weight, made.bias, made.tp_size = torch.randn(*shape).to(dtype), None, 1
        made.quant_method = type("UnquantizedLinearMethod", (), {})()
        return made

    norm = type("RMSNorm", (SimpleNamespace,), {})
    norms = [
        norm(
            weight=torch.ones(HIDDEN, dtype=dtype), variance_epsilon=1e-5, fp32_residual=False,
            cast_x_before_out_mul=False, variance_size_override=None, override_orig_dtype=None,
        )
        for _ in range(2)
    ]  # fmt: skip
    width = (HEADS + 2 * KV_HEADS) * DIM
    rotary = type("RotaryEmbedding", (SimpleNamespace,), {})(
        cos_sin_cache=torch.randn(64, DIM), rotary_dim=DIM, is_neox_style=True
    )
    attend = SimpleNamespace(
        qkv_proj=part("QKVParallelLinear", width, HIDDEN),
        o_proj=part("RowParallelLinear", HIDDEN, HEADS * DIM),
        rotary_emb=rotary,
        attn=SimpleNamespace(
            attn_type=SimpleNamespace(value="decoder"), sliding_window_size=-1, logit_cap=0.0,
            is_cross_attention=False, qk_head_dim=DIM, v_head_dim=DIM, head_dim=DIM, layer_id=0,
            tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, scaling=DIM**-0.5,
        ),
    )  # fmt: skip
    mlp = SimpleNamespace(
        gate_up_proj=part("MergedColumnParallelLinear", 2 * INNER, HIDDEN),
        down_proj=part("RowParallelLinear", HIDDEN, INNER),
        act_fn=type("SiluAndMul", (), {})(),
    )
    return SimpleNamespace(
        self_attn=attend, mlp=mlp, input_layernorm=norms[0], post_attention_layernorm=norms[1]
    )


def _pool(dtype: torch.dtype) -> Any:
    keys, values = torch.zeros(400, KV_HEADS, DIM, dtype=dtype), torch.zeros(400, KV_HEADS, DIM).to(dtype)  # fmt: skip # noqa: E501
    return type("MHATokenToKVPool", (SimpleNamespace,), {})(
        layer_transfer_counter=None,
        get_key_buffer=lambda _: keys,
        get_value_buffer=lambda _: values,
    )


def _quantise(one: SimpleNamespace) -> None:
    one.mlp.down_proj.quant_method = type("Fp8LinearMethod", (), {})()


def _adapt(one: SimpleNamespace) -> None:
    one.self_attn.qkv_proj = type("QKVParallelLinearWithLoRA", (SimpleNamespace,), {})(weight=None)


def _share(one: SimpleNamespace) -> None:
    one.self_attn.o_proj.tp_size = 2


def _window(one: SimpleNamespace) -> None:
    one.self_attn.attn.sliding_window_size = 64


def _stretch(one: SimpleNamespace) -> None:
    kind = type("YaRNScalingRotaryEmbedding", (SimpleNamespace,), {})
    one.self_attn.rotary_emb = kind(**vars(one.self_attn.rotary_emb))


@pytest.mark.parametrize("change", [_quantise, _adapt, _share, _window, _stretch])
def test_a_layer_that_is_not_plain_goes_sglangs_way_with_one_line_for_all_alike(change, caplog):
    layer.forget()
    x, pool = torch.randn(1, HIDDEN), _pool(torch.float32)
    alike = [_sglang_layer(torch.float32) for _ in range(3)]
    for one in alike:
        change(one)
    with caplog.at_level(logging.WARNING, "aurora_sgl"):
        assert [layer.compiled(one, x, pool) for one in [*alike, *alike]] == [None] * 6
    assert len(caplog.records) == 1 and "SGLang's own way" in caplog.text
    plain = _sglang_layer(torch.float32)
    assert layer.compiled(plain, x, pool) is not None
    layer.forget()


def test_weights_that_move_are_found_again_and_another_dtype_is_refused():
    layer.forget()
    one, pool, x = _sglang_layer(torch.bfloat16), _pool(torch.bfloat16), torch.randn(1, HIDDEN)
    first = layer.compiled(one, x.bfloat16(), pool)
    assert first is not None and layer.compiled(one, x.bfloat16(), pool) is first
    moved = one.mlp.down_proj.weight = one.mlp.down_proj.weight.clone()
    layer.forget()  # as the hooks on SGLang's weight updates do
    second = layer.compiled(one, x.bfloat16(), pool)
    assert second is not None and second.struct.down == moved.data_ptr()
    one.mlp.down_proj.weight.set_(torch.randn(HIDDEN, INNER).bfloat16())
    third = layer.compiled(one, x.bfloat16(), pool)  # seen without being told
    assert third is not None and third.struct.down == one.mlp.down_proj.weight.data_ptr()
    assert layer.compiled(one, x.bfloat16(), _pool(torch.bfloat16)) is not third
    assert layer.compiled(one, x, pool) is None  # float32 rows, bfloat16 weights
    layer.forget()


def test_after_a_swap_only_the_layers_whose_memory_was_exchanged_are_looked_at_anew():
    layer.forget()
    pool, x = _pool(torch.float32), torch.randn(1, HIDDEN)
    drafter, target = _sglang_layer(torch.float32), _sglang_layer(torch.float32)
    first, other = layer.compiled(drafter, x, pool), layer.compiled(target, x, pool)
    norm = drafter.input_layernorm.weight
    norm.data = norm.data.clone()
    layer.forget_moved()
    second = layer.compiled(drafter, x, pool)
    assert second is not None and second is not first and second.struct.norm == norm.data_ptr()
    assert layer.compiled(target, x, pool) is other
    layer.forget()


class _Mode(Enum):
    """SGLang's ForwardMode as far as the plan looks at it."""

    DECODE = "decode"
    VERIFY = "verify"
    DRAFT_EXTEND = "SGLang's is_extend() says no, and its backend extends all the same"
    IDLE = "idle"

    def is_decode(self) -> bool:
        return self is _Mode.DECODE

    def is_idle(self) -> bool:
        return self is _Mode.IDLE


@pytest.mark.parametrize("mode", list(_Mode))
def test_every_kind_of_step_is_planned_but_an_idle_one(mode):
    table, lengths = torch.arange(200).view(2, 100).to(torch.int32), torch.tensor([9, 40])
    news, starts = torch.tensor([4, 4]), torch.tensor([0, 4])
    backend = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        draft_decode_metadata=None,
        extend_metadata=None if mode is _Mode.DECODE else (lengths, news, starts, None),
        forward_metadata=(None, 4),
    )
    batch = SimpleNamespace(
        forward_mode=mode, seq_lens=lengths, req_pool_indices=torch.tensor([0, 1])
    )
    attention.begin_forward()
    plan = layer.plan_of(backend, batch)
    if mode is _Mode.IDLE:
        assert plan is None
        return
    assert plan is not None and plan.struct.batch == 2
    assert plan.longest_new == (1 if mode is _Mode.DECODE else 4)
    assert layer.plan_of(backend, batch) is plan  # made once for all layers of a forward
    backend.forward_metadata = (None, 65)
    if mode is not _Mode.DECODE:
        assert layer.plan_of(backend, batch) is None  # a long prefill
    attention.begin_forward()
