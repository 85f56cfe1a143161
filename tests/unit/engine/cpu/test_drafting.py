"""The drafter's lean forwards against its forward over whole trees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from aurora_sgl.engine.cpu import drafting, fused, layer, linear, native
from aurora_sgl.engine.cpu.compiled_attention import ForwardPlan
from tests.unit.engine.cpu.test_layer import (  # noqa: F401
    DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    _pool,
    _sglang_layer,
    compiled,
)

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")

VOCABULARY, WIDTH = 70, 6


@pytest.fixture(autouse=True)
def anew():
    layer.forget()
    yield
    layer.forget()


class _Forward:
    """Where SGLang would be asked: the outputs, whichever way they came."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        one = _sglang_layer(dtype)
        one.hidden_norm, one.is_input_layer = one.post_attention_layernorm, True
        width = (HEADS + 2 * KV_HEADS) * DIM
        one.self_attn.qkv_proj.weight = torch.randn(width, 2 * HIDDEN).to(dtype) * 0.1
        fc = torch.randn(HIDDEN, 3 * HIDDEN).to(dtype) * 0.1
        body = SimpleNamespace(
            layers=[one], fc=lambda x: linear.own(x, fc, None), norm_output=False,
            norm=one.input_layernorm,
            embed_tokens=SimpleNamespace(weight=torch.randn(90, HIDDEN).to(dtype)),
        )  # fmt: skip
        head = torch.randn(VOCABULARY, HIDDEN).to(dtype)
        self.model = SimpleNamespace(
            model=body, lm_head=head,
            logits_processor=SimpleNamespace(
                vocab_size=VOCABULARY,
                _compute_lm_head=lambda x, weight: linear.own(x, weight, None),
            ),
        )  # fmt: skip
        self.pool = _pool(dtype)
        self.table = torch.randperm(400).view(4, 100).to(torch.int32)
        self.backend = type(layer.BACKEND, (SimpleNamespace,), {})(
            token_to_kv_pool=self.pool, req_to_token_pool=SimpleNamespace(req_to_token=self.table)
        )
        self.runner = SimpleNamespace(model=self.model, attn_backend=self.backend)

    def whole(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Every row of every tree, as SGLang does it: logits and states."""
        requests = batch.batch_size
        plan = ForwardPlan(
            self.table, batch.req_pool_indices, batch.seq_lens, window=0,
            news=torch.full((requests,), WIDTH), starts=torch.arange(requests) * WIDTH,
        )  # fmt: skip
        body = self.model.model
        hidden = body.fc(batch.spec_info.hidden_states)
        embedded = F.embedding(batch.input_ids, body.embed_tokens.weight)
        out, residual = layer.run(
            body.layers[0], self.backend, plan, batch.positions, batch.out_cache_loc, hidden, None,
            embedded,
        )  # fmt: skip
        normed = fused.norm(out, residual, body.norm.weight, body.norm.variance_epsilon)
        return linear.own(normed, self.model.lm_head, None).float(), residual


def _batch(one: _Forward, accepted: list[int], dtype: torch.dtype) -> Any:
    requests = len(accepted)
    committed = torch.tensor([4 + 3 * r for r in range(requests)])
    positions = (committed[:, None] + torch.arange(WIDTH)[None, :]).flatten()
    rows = torch.arange(requests).repeat_interleave(WIDTH)
    return SimpleNamespace(
        batch_size=requests, req_pool_indices=torch.arange(requests), seq_lens=committed + WIDTH,
        positions=positions, out_cache_loc=one.table[rows, positions].long(),
        input_ids=torch.randint(0, 90, (requests * WIDTH,)),
        spec_info=SimpleNamespace(
            num_tokens_per_req=WIDTH, num_accept_tokens=torch.tensor(accepted, dtype=torch.int32),
            hidden_states=torch.randn(requests * WIDTH, 3 * HIDDEN).to(dtype),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accepted", [[1], [4], [WIDTH], [3, 1, WIDTH, 2]])
def test_accepted_nodes_alone_give_what_the_whole_tree_gives(accepted, dtype):
    one = _Forward(dtype)
    batch = _batch(one, accepted, dtype)
    keys = one.pool.get_key_buffer(0)
    logits, hidden = drafting._extend(one.runner, batch)
    after_lean = keys.clone()
    keys.zero_()
    whole_logits, whole_hidden = one.whole(batch)
    last = torch.tensor([r * WIDTH + n - 1 for r, n in enumerate(accepted)])
    assert torch.equal(hidden[last], whole_hidden[last])
    assert torch.equal(logits[last], whole_logits[last])
    assert logits.shape == whole_logits.shape and hidden.shape == whole_hidden.shape
    kept = torch.cat([torch.arange(r * WIDTH, r * WIDTH + n) for r, n in enumerate(accepted)])
    slots = batch.out_cache_loc[kept]
    assert torch.equal(after_lean[slots], keys[slots]) and keys[slots].any()
    rejected = set(range(400)) - set(slots.tolist())
    assert not after_lean[list(rejected)].any()  # nothing else was touched


def test_rows_that_are_not_whole_trees_are_left_to_sglang():
    one = _Forward(torch.float32)
    batch = _batch(one, [2, 2], torch.float32)
    batch.input_ids = batch.input_ids[:-1]
    assert drafting._extend(one.runner, batch) is None
    other = _batch(one, [2, 2], torch.float32)
    one.runner.attn_backend = SimpleNamespace(req_to_token_pool=one.backend.req_to_token_pool)
    assert drafting._extend(one.runner, other) is None
