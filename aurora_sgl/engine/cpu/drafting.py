"""An EAGLE3 drafter's forwards while decoding on CPU, without what they do not need.

SGLang runs them like any model: copies of the batch, plans, a logits processor that looks for a
dozen kinds of work. For a drafter of one layer that took longer than its arithmetic. And after a
verify step it runs the drafter over every node of the tree, accepted or not, with the head for
each, to use one row per request. Here the accepted nodes are run, and the head only for the last of
them. All the rest stays SGLang's; so does every forward that is not covered.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from aurora_sgl.engine.cpu import fused, layer, upstream
from aurora_sgl.engine.cpu.compiled_attention import LONGEST, ForwardPlan

_coverage: dict[int, tuple[Any, bool]] = {}  # id of the model -> itself, whether it is covered


def forward(runner: Any, forward_batch: Any) -> Any:
    """``ModelRunner.forward`` of a drafter: see ``upstream.Beside``."""
    if not runner.is_draft_worker or not _covered(runner, forward_batch):
        return None
    mode, done = forward_batch.forward_mode, None
    if mode.is_decode():
        done = _step(runner, forward_batch)
    elif mode.is_draft_extend_v2():
        done = _extend(runner, forward_batch)
    if done is None:
        return None
    output, logits_output = _outputs()
    runner_output = output(
        logits_output=logits_output(next_token_logits=done[0], hidden_states=done[1]),
        can_run_graph=False,
    )
    runner.forward_pass_id += 1
    return runner_output


def _covered(runner: Any, batch: Any) -> bool:
    model = runner.model
    entry = _coverage.get(id(model))
    if entry is None:
        entry = _coverage[id(model)] = (model, _plain(runner))
    return (
        entry[1]
        and not batch.return_logprob
        and batch.global_num_tokens_cpu is None
        and batch.spec_info is not None
        and batch.spec_info.hidden_states is not None
        and batch.input_ids is not None
        and not batch.needs_forward_metadata_init()
    )


def _plain(runner: Any) -> bool:
    """Whether the model is a drafter of one layer with none of the variants."""
    model = runner.model
    # The one place that asks SGLang's class for its name: what follows computes the forward of this
    # class line by line, and a subclass of another name may compute something else.
    if type(model).__name__ != "LlamaForCausalLMEagle3":
        return False
    body, head = model.model, model.logits_processor
    return (
        len(body.layers) == 1
        and body.layers[0].is_input_layer
        and body.input_norm is None
        and body.fc_norm is None
        and not body.is_mrope_enabled
        and upstream.processes(body.embed_tokens) == 1
        and upstream.processes(model.lm_head) == 1
        and layer.plain_norm(body.norm)
        and not head.do_tensor_parallel_all_gather
        and not head.do_tensor_parallel_all_gather_dp_attn
        and head.logit_scale is None
        and not head.final_logit_softcapping
        and runner.canary_manager is None
    )


@lru_cache(maxsize=1)
def _outputs() -> tuple[Any, Any]:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.model_executor.model_runner import ModelRunnerOutput

    return ModelRunnerOutput, LogitsProcessorOutput


def _run(
    model: Any,
    backend: Any,
    plan: ForwardPlan,
    ids: torch.Tensor,  # [rows]
    positions: torch.Tensor,  # [rows]
    slots: torch.Tensor,  # [rows]
    hidden: torch.Tensor,  # [rows, hidden] or [rows, 3 * hidden] of the target
) -> tuple[torch.Tensor, torch.Tensor] | None:  # both [rows, hidden]: for the head, for more steps
    body = model.model
    embedded = F.embedding(ids, body.embed_tokens.weight)
    if hidden.shape[-1] != embedded.shape[-1]:
        hidden = body.fc(hidden)
    done = layer.run(body.layers[0], backend, plan, positions, slots, hidden, None, embedded)
    if done is None:
        return None
    out, residual = done
    normed, residual = fused.add_and_norm(body.norm, out, residual)
    return normed, (normed if body.norm_output else residual)


def _logits(model: Any, normed: torch.Tensor) -> torch.Tensor:  # [rows, draft vocabulary] float32
    head = model.logits_processor
    return head._compute_lm_head(normed, model.lm_head)[:, : head.vocab_size].float()  # type: ignore[no-any-return]


def _step(runner: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One more level of the tree: a row for each branch."""
    backend = layer.backend_of_this_forward()
    plan = layer.plan_of(backend, batch) if backend is not None else None
    if plan is None:
        return None
    slots = batch.out_cache_loc.contiguous()  # one level of what was reserved for all
    hidden = batch.spec_info.hidden_states.contiguous()
    done = _run(runner.model, backend, plan, batch.input_ids, batch.positions, slots, hidden)
    return None if done is None else (_logits(runner.model, done[0]), done[1])


def _extend(runner: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The accepted nodes and the bonus token of every request, in rows that SGLang laid out for
    whole trees; what it does not read of the result is zero."""
    model, backend, given = runner.model, runner.attn_backend, batch.spec_info
    width, requests = given.num_tokens_per_req, batch.batch_size
    table = backend.req_to_token_pool.req_to_token
    rows = batch.input_ids.shape[0]
    if (
        type(backend).__name__ != layer.BACKEND
        or given.num_accept_tokens is None
        or rows != requests * width
        or width > LONGEST
        or not layer.int_table(table)
    ):
        return None
    news = given.num_accept_tokens.to(torch.int64)  # [requests]
    kept = (torch.arange(width)[None, :] < news[:, None]).flatten().nonzero()[:, 0]
    ends = news.cumsum(0)
    lengths = batch.seq_lens - width + news  # its lengths are those after whole trees
    plan = ForwardPlan(
        table, batch.req_pool_indices, lengths, window=0, news=news, starts=ends - news
    )
    done = _run(
        model, backend, plan, batch.input_ids[kept], batch.positions[kept],
        batch.out_cache_loc[kept], given.hidden_states[kept],
    )  # fmt: skip
    if done is None:
        return None
    last = ends - 1
    some = _logits(model, done[0][last])
    logits = some.new_zeros((rows, some.shape[1]))
    hidden = done[1].new_zeros((rows, done[1].shape[1]))
    out_rows = kept[last]
    logits[out_rows], hidden[out_rows] = some, done[1][last]
    return logits, hidden
