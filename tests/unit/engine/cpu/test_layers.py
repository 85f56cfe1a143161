"""All layers in one compiled call are, bit for bit, one after the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_sgl.engine.cpu import fused, layer, layers, native
from aurora_sgl.engine.cpu.compiled_attention import ForwardPlan
from tests.unit.engine.cpu.test_layer import HIDDEN, KV_HEADS, _pool, _sglang_layer, compiled  # noqa: F401

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")

MANY = 5


@pytest.fixture(autouse=True)
def anew():
    layer.forget()
    layers.forget()
    yield
    layer.forget()
    layers.forget()


def _model(dtype: torch.dtype, captured: list[int]) -> SimpleNamespace:
    torch.manual_seed(0)
    kind = type("LlamaDecoderLayer", (SimpleNamespace,), {})
    made = [kind(**vars(_sglang_layer(dtype))) for _ in range(MANY)]
    for at, one in enumerate(made):
        one.self_attn.attn.layer_id = at
        for part in (one.self_attn.qkv_proj, one.self_attn.o_proj, one.mlp.gate_up_proj):
            part.weight.mul_(0.1)
        one.mlp.down_proj.weight.mul_(0.1)
    table = torch.randn(50, HIDDEN).to(dtype)
    embed = type("Embedding", (SimpleNamespace,), {"__call__": lambda self, ids: table[ids]})
    return SimpleNamespace(
        layers=made, norm=made[0].input_layernorm, layers_to_capture=captured, start_layer=0,
        end_layer=MANY, pp_group=SimpleNamespace(world_size=1), embed_tokens=embed(weight=table),
    )  # fmt: skip


def _cache(dtype: torch.dtype) -> Any:
    caches = [_pool(dtype) for _ in range(MANY)]
    return type("MHATokenToKVPool", (SimpleNamespace,), {})(
        layer_transfer_counter=None,
        get_key_buffer=lambda at: caches[at].get_key_buffer(0),
        get_value_buffer=lambda at: caches[at].get_value_buffer(0),
    )


def _setting(monkeypatch: pytest.MonkeyPatch, pool: Any) -> SimpleNamespace:
    """A decode of two requests, and the backend that SGLang would name for it."""
    table = torch.randperm(400).view(4, 100).to(torch.int32)
    lengths = torch.tensor([5, 9])
    backend = type(layer.BACKEND, (SimpleNamespace,), {})(token_to_kv_pool=pool)
    monkeypatch.setattr(layer, "backend_of_this_forward", lambda: backend)
    plan = ForwardPlan(table, torch.arange(2), lengths, window=0)
    monkeypatch.setattr(layer, "plan_of", lambda of, batch: plan)
    slots = table[torch.arange(2), lengths - 1].long()
    return SimpleNamespace(
        backend=backend, plan=plan, positions=lengths - 1, slots=slots, ids=torch.tensor([3, 41])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("captured", [[], [1, 3, 4]])
def test_one_call_is_its_layers_one_by_one(monkeypatch, captured, dtype):
    model, pool = _model(dtype, captured), _cache(dtype)
    given = _setting(monkeypatch, pool)
    batch = SimpleNamespace(out_cache_loc=given.slots)
    got = layers.target_body(model, given.ids, given.positions, batch)
    assert got is not None, "not covered"
    pools = [pool.get_key_buffer(at).clone() for at in range(MANY)]
    x, residual, states = model.embed_tokens(given.ids), None, []
    for at, one in enumerate(model.layers):
        if at in captured:
            states.append(x + residual)
        x, residual = layer.run(
            one, given.backend, given.plan, given.positions, given.slots, x, residual, None
        )
    normed = fused.norm(x, residual, model.norm.weight, model.norm.variance_epsilon)
    found, found_states = got if captured else (got, [])
    assert torch.equal(found, normed) and torch.isfinite(normed).all()
    assert len(found_states) == len(states)
    assert all(torch.equal(a, b) for a, b in zip(found_states, states, strict=True))
    assert all(torch.equal(pool.get_key_buffer(at), kept) for at, kept in enumerate(pools))
    assert KV_HEADS and pools[0].any()


def test_what_is_captured_may_change_and_weights_may_move(monkeypatch):
    model, pool = _model(torch.float32, []), _cache(torch.float32)
    given = _setting(monkeypatch, pool)
    batch = SimpleNamespace(out_cache_loc=given.slots)

    def run() -> Any:
        return layers.target_body(model, given.ids, given.positions, batch)

    before = run()
    model.layers_to_capture = [2]
    after, (state,) = run()
    assert torch.equal(before, after) and state.shape == before.shape
    down = model.layers[4].mlp.down_proj
    down.weight.set_(torch.zeros_like(down.weight))
    assert not torch.equal(run()[0], before)


@pytest.mark.parametrize("change", ["pipeline", "another layer", "a window"])
def test_a_model_that_is_not_plain_goes_sglangs_way(monkeypatch, change):
    model, pool = _model(torch.float32, []), _cache(torch.float32)
    given = _setting(monkeypatch, pool)
    if change == "pipeline":
        model.pp_group.world_size = 2
    elif change == "another layer":
        model.layers[1] = type("MoeLayer", (SimpleNamespace,), {})(**vars(model.layers[1]))
    else:
        model.layers[3].self_attn.attn.sliding_window_size = 16
    batch = SimpleNamespace(out_cache_loc=given.slots)
    for _ in range(2):  # the second time it is known
        assert layers.target_body(model, given.ids, given.positions, batch) is None
