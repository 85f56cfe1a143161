"""The SGLang plugin: every hook, and every upstream name that we lean on.

``register`` is the entry point of the group ``sglang.srt.plugins``. SGLang calls it in its main
process and in every scheduler process; which hooks are set depends on where it runs. Whether they
do anything is decided at launch, see ``engine.startup``.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pkgutil
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from aurora_sgl import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aurora_sgl.engine.agent import Agent
    from aurora_sgl.engine.cpu.upstream import Beside
    from aurora_sgl.engine.herald import Herald

logger = logging.getLogger("aurora_sgl")

_SPECULATIVE = "sglang.srt.speculative."
_MANAGERS = "sglang.srt.managers."

#: Hooked in the process that takes HTTP requests, with ``uvicorn.run``, which starts more of them.
MAIN_HOOKS = (
    "sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
    f"{_MANAGERS}tokenizer_manager.TokenizerManager._create_tokenized_object",
    f"{_MANAGERS}io_struct.GenerateReqInput.normalize_batch_and_arguments",
    "sglang.srt.utils.common.kill_process_tree",
)

#: Hooked in every scheduler process.
SCHEDULER_HOOKS = (
    f"{_SPECULATIVE}eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation",
    f"{_SPECULATIVE}eagle_worker_v2.EagleDraftWorker._draft_extend_for_prefill",
    f"{_SPECULATIVE}eagle_worker_v2.EAGLEWorkerV2.verify",
    f"{_SPECULATIVE}eagle_utils.eagle_sample",
    f"{_SPECULATIVE}eagle_utils.verify_tree_greedy_func",
    "sglang.srt.layers.logits_processor.LogitsProcessor.forward",
    f"{_MANAGERS}scheduler.Scheduler.init_memory_pools",
    f"{_MANAGERS}scheduler.Scheduler.process_input_requests",
    f"{_MANAGERS}scheduler_components.request_receiver.SchedulerRequestReceiver._pull_raw_reqs",
    f"{_MANAGERS}scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor.process_batch_result_decode",
    f"{_MANAGERS}scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor.process_batch_result_prefill",
)

#: Hooked in every scheduler process of a machine without a GPU.
CPU_HOOKS = (
    f"{_SPECULATIVE}eagle_utils._verify_uses_greedy",
    "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.process_weights_after_loading",
    "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding.__init__",
    "sglang.srt.models.llama_eagle3.LlamaModel.__init__",
    f"{_MANAGERS}scheduler_components.weight_updater."
    "SchedulerWeightUpdaterManager._observe_weight_load",
    f"{_MANAGERS}scheduler_components.weight_updater."
    "SchedulerWeightUpdaterManager.end_weight_update",
    "sglang.srt.layers.attention.intel_amx_backend.IntelAMXAttnBackend.init_forward_metadata",
    "sglang.srt.layers.attention.intel_amx_backend."
    "IntelAMXMultiStepDraftBackend.init_forward_metadata",
    f"{_SPECULATIVE}spec_utils.select_top_k_tokens",
    f"{_SPECULATIVE}eagle_utils.organize_draft_results",
)

#: Hooked there too, where the compiled kernels are in use.
COMPILED_HOOKS = (
    "sglang.srt.layers.layernorm.RMSNorm.forward_native",
    "sglang.srt.layers.activation.SiluAndMul.forward_native",
    "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.forward_native",
    "sglang.srt.models.llama.LlamaDecoderLayer.forward",
    "sglang.srt.models.llama_eagle3.LlamaDecoderLayer.forward",
    "sglang.srt.models.llama.LlamaModel.forward",
    "sglang.srt.model_executor.model_runner.ModelRunner.forward",
)

#: What processes run that load plugins too, from SGLang 0.5.22 on, and have no model.
WITHOUT_A_MODEL = (
    f"{_MANAGERS}detokenizer_manager.run_detokenizer_process",
    f"{_MANAGERS}data_parallel_controller.run_data_parallel_controller_process",
)

#: Read or called, not hooked.
LEANED_ON = (
    "sglang.srt.plugins.hook_registry.HookRegistry",
    "sglang.srt.plugins.load_plugins",
    "sglang.srt.environ.envs",
    "sglang.srt.server_args.prepare_server_args",
    "sglang.srt.entrypoints.http_server.app",
    f"{_MANAGERS}tokenizer_manager.ServerStatus",
    f"{_MANAGERS}utils.GenerationBatchResult.accept_lens",
    f"{_MANAGERS}schedule_batch.Req",
    f"{_MANAGERS}schedule_batch.Req._compute_max_prefix_len",
    "sglang.srt.mem_cache.base_prefix_cache.MatchPrefixParams",
    "sglang.srt.mem_cache.radix_cache.RadixKey",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.move_kv_cache",
    f"{_MANAGERS}io_struct.TokenizedGenerateReqInput",
    f"{_MANAGERS}io_struct.SessionParams",
    f"{_MANAGERS}io_struct.BatchTokenizedGenerateReqInput",
    "sglang.srt.runtime_context.get_parallel",
    "sglang.srt.distributed.parallel_state.get_tp_group",
    f"{_SPECULATIVE}eagle_worker_v2.EAGLEWorkerV2._build_trivial_verify_input",
    f"{_SPECULATIVE}eagle_worker_v2.EAGLEWorkerV2._stub_skipped_draft_extend",
    f"{_SPECULATIVE}eagle_worker_v2.EagleDraftWorker._draft_extend_for_decode",
    "sglang.srt.environ.Envs.SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND",
    "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head",
    "sglang.srt.layers.sampler.apply_custom_logit_processor",
    "sglang.srt.sampling.sampling_params.SamplingParams",
    f"{_SPECULATIVE}eagle_info.EagleVerifyInput",
    "sglang.srt.model_executor.model_runner.ModelRunnerOutput",
    "sglang.srt.models.llama_eagle3.LlamaForCausalLMEagle3",
    "sglang.srt.models.llama_eagle.LlamaForCausalLMEagle",
)

UPSTREAM = (
    *(*MAIN_HOOKS, *SCHEDULER_HOOKS, *CPU_HOOKS, *COMPILED_HOOKS),
    *(*WITHOUT_A_MODEL, *LEANED_ON),
)

_agent: Agent | None = None
_herald: Herald | None = None  # where the agent could not start

#: SGLang derives workers of other kinds of speculation from it, to which the hooks do not fit.
_WORKER = "EAGLEWorkerV2"


def register() -> None:
    """Set the hooks of this process, all or none. Called by SGLang.

    ``AURORA_ENABLED=0`` leaves it untouched, and so does a server to which we have nothing to add.
    """
    if not environment.is_enabled():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from aurora_sgl.config import forgive_mistakes

    forgive_mistakes()
    if multiprocessing.parent_process() is None:
        hooks = main_hooks()
    elif runs_one_of(WITHOUT_A_MODEL) or environment.is_set(environment.IDLE):
        return
    else:
        hooks = {} if environment.value(environment.IDLE) else scheduler_hooks()
        if _on_cpu():  # before the look at the names imports what takes kernels from us
            _register_on_cpu(HookRegistry, HookType)
    if missing := first_missing(hooks):
        _say_nothing_is_recorded(f"this SGLang has no {missing}; see aurora-sgl doctor")
        hooks = {}
    for name, hook in hooks.items():
        HookRegistry.register(name, hook, HookType.AROUND)


def _say_nothing_is_recorded(why: str) -> None:
    line = f"aurora-sgl: nothing is recorded, traced or swapped: {why}"
    print(line, file=sys.stderr, flush=True)  # SGLang sets its loggers up later


def first_missing(names: Iterable[str]) -> str:
    """The first of these dotted names that this SGLang does not have, or can't import; "": none."""
    for name in names:
        try:
            pkgutil.resolve_name(name)
        except Exception:
            return name
    return ""


def main_hooks() -> dict[str, Callable[..., Any]]:
    """Around what of the process that takes HTTP requests: ``hook(original, *arguments of it)``."""
    from aurora_sgl.engine import front, sidecars, workers

    hooks = (
        _launch_subprocesses,
        front.create_tokenized_object,
        front.normalize,
        sidecars.stop_first,
    )
    return {**dict(zip(MAIN_HOOKS, hooks, strict=True)), "uvicorn.run": workers.run_uvicorn}


def runs_one_of(functions: tuple[str, ...]) -> bool:
    """Whether this process was started to run one of these, given by their dotted names."""
    target = getattr(multiprocessing.current_process(), "_target", None)
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    return name in functions


def scheduler_hooks() -> dict[str, Callable[..., Any]]:
    """Around what of every scheduler process: ``hook(original, *arguments of it)``."""
    hooks = (
        _forward_batch_generation,
        _draft_extend_for_prefill,
        _verify,
        _eagle_sample,
        _verify_tree_greedy_func,
        _process_logits,
        _init_memory_pools,
        _process_input_requests,
        _pull_raw_reqs,
        _process_batch_result_decode,
        _process_batch_result_prefill,
    )
    return dict(zip(SCHEDULER_HOOKS, hooks, strict=True))


def compiled_hooks() -> dict[str, Beside]:
    """The same of what our compiled kernels stand for."""
    from aurora_sgl.engine.cpu import drafting, fused, layer, layers
    from aurora_sgl.engine.cpu.upstream import Beside

    hooks = (
        Beside(fused.rms_norm),
        Beside(fused.silu_and_mul),
        Beside(fused.rotary),
        Beside(layer.target_layer, spare=True),
        Beside(layer.drafter_layer, spare=True),
        Beside(layers.target_body),
        Beside(drafting.forward),
    )
    return dict(zip(COMPILED_HOOKS, hooks, strict=True))


def cpu_hooks() -> dict[str, tuple[str, Callable[..., Any]]]:
    """Of every scheduler process without a GPU: when (the value of a ``HookType``), and what."""
    from aurora_sgl.engine.cpu import layer, layers, linear
    from aurora_sgl.engine.cpu.attention import begin_forward

    def linear_loaded(result: Any, method: Any, layer: Any, *args: Any, **kw: Any) -> None:
        linear.mark(layer)

    def embedding_made(result: Any, embedding: Any, *args: Any, **kw: Any) -> None:
        linear.mark(embedding)

    def drafter_made(result: Any, model: Any, *args: Any, **kw: Any) -> None:
        linear.route(model.fc)

    def weights_changed(*args: Any, **kw: Any) -> None:
        # SGLang's own weight updates change values in place: what was packed is then stale.
        linear.forget()
        layer.forget()
        layers.forget()

    def forward_begins(*args: Any, **kw: Any) -> None:
        begin_forward()

    hooks = (
        ("replace", _verify_uses_greedy),
        ("after", linear_loaded),
        ("after", embedding_made),
        ("after", drafter_made),
        ("before", weights_changed),
        ("before", weights_changed),
        ("before", forward_begins),
        ("before", forward_begins),
        ("around", _select_top_k_tokens),
        ("around", _organize_draft_results),
    )
    return dict(zip(CPU_HOOKS, hooks, strict=True))


def _register_on_cpu(registry: Any, kinds: Any) -> None:
    import torch

    from aurora_sgl.engine.cpu import linear, native, sampling

    if not torch.cuda.is_available():
        # SGLang's checksum of the weights (0.5.21) waits for a device that is not there.
        torch.cuda.synchronize = lambda device=None: None
    # SGLang sets its loggers up later.
    print(f"aurora-sgl: bfloat16 layers: {linear.choose().reason}", file=sys.stderr, flush=True)
    sampling.provide()
    for name, (when, hook) in cpu_hooks().items():
        registry.register(name, hook, kinds(when))
    if native.library() is not None:
        for name, compiled in compiled_hooks().items():
            registry.register(name, compiled, kinds.AROUND)


def _on_cpu() -> bool:
    """Whether our own CPU kernels are in place: see ``engine.launch``."""
    return environment.is_set(environment.CPU)


# -- the process that takes HTTP requests ------------------------------------------------------


def _launch_subprocesses(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    try:
        _before_launch(*args, **kw)
    except Exception as error:
        logger.exception("aurora: the start failed; SGLang goes on without")
        environment.leave_alone()
        _say_nothing_is_recorded(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return original(*args, **kw)


def _before_launch(*args: Any, **kw: Any) -> None:
    server_args = kw.get("server_args") or next(
        (a for a in args if hasattr(a, "speculative_algorithm")), None
    )
    asked = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    if asked or getattr(server_args, "device", "") == "cpu":
        from aurora_sgl.engine.openmp import wait_politely

        wait_politely()
    from aurora_sgl.engine import labels, startup

    startup.begin(server_args)
    http_server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if environment.value(environment.STAMP) and http_server is not None:
        http_server.app.add_middleware(labels.HeaderMiddleware)


# -- the scheduler process -----------------------------------------------------------------------


def _init_memory_pools(original: Callable[..., Any], scheduler: Any, *args: Any, **kw: Any) -> Any:
    """SGLang has loaded both models, and sizes its KV pool by what is left."""
    worker = getattr(scheduler, "draft_worker", None)
    if type(worker).__name__ == _WORKER and environment.value(environment.ENDPOINT):
        try:
            from aurora_sgl.engine import shadows

            size = shadows.reserve(worker)
            logger.info("aurora: %.0f MB are held for the drafter's next version", size / 1e6)
        except Exception as error:  # told again where the first swap is refused
            logger.warning("aurora: no room for the drafter's next version: %s", error)
    return original(scheduler, *args, **kw)


def _agent_of(worker: Any) -> Agent | None:
    """The agent of this process; made when the first batch shows the worker. None: switched off."""
    global _agent
    off = getattr(worker, "_aurora_off", False) or type(worker).__name__ != _WORKER
    if _agent is None and not off:
        try:
            from aurora_sgl.engine.agent import Agent
            from aurora_sgl.engine.describe import describe_worker

            description, leads = describe_worker(worker)
            _agent = Agent(worker, description, leads=leads)
            if _on_cpu():
                from aurora_sgl.engine.cpu import upstream

                upstream.tell(_agent.notices)
        except Exception as error:
            worker._aurora_off = True
            logger.exception("aurora: could not start in this scheduler; serving goes on without")
            _tell_failure(worker, error)
    return _agent


def _tell_failure(worker: Any, error: Exception) -> None:
    global _herald
    try:
        from aurora_sgl.engine.herald import Herald

        _herald = Herald.of(worker, error)
    except Exception:
        logger.exception("aurora: nobody can be told so")


def _poll_herald() -> None:
    global _herald
    if _herald is not None:
        try:
            _herald.poll()
        except Exception:
            _herald = None
            logger.exception("aurora: the sidecar is told nothing more")


def _forward_batch_generation(
    original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kw: Any
) -> Any:
    agent = _agent_of(worker)
    if agent is None or batch.forward_mode.is_idle():
        return original(worker, batch, *args, **kw)
    if batch.forward_mode.is_extend():
        agent.prefill = None
        result = original(worker, batch, *args, **kw)
        result.aurora_prefill, agent.prefill = agent.prefill, None
        return result
    choose = partial(agent.choose_shape, batch)
    shape = agent.parts.attempt("choosing a step's drafts", choose, agent.step_shape.whole)
    size = len(batch.reqs)
    begun = time.perf_counter()
    with agent.step_shape.set_to(shape):
        result = original(worker, batch, *args, **kw)
    seconds = time.perf_counter() - begun
    agent.guard("timing steps", lambda: agent.account_step(size, shape=shape, seconds=seconds))
    return result


def _select_top_k_tokens(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    trees = _agent.trees if _agent is not None else None
    return original(*args, **kw) if trees is None else trees.select(original, *args, **kw)


def _organize_draft_results(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    trees = _agent.trees if _agent is not None else None
    return original(*args, **kw) if trees is None else trees.organize(original, *args, **kw)


def _draft_extend_for_prefill(
    original: Callable[..., Any],
    drafter: Any,
    batch: Any,
    target_hidden_states: Any,
    *args: Any,
    **kw: Any,
) -> Any:
    """Between the target's prefill and the drafter's, whose CUDA graphs may write over what the
    target's left in memory that they share."""
    agent = _agent
    if agent is not None and batch.reqs:
        # On every rank and whatever failed before: what the ranks do in a step follows from it.
        none: list[Any] = []
        begin = partial(agent.begin, batch)
        new = agent.parts.attempt("beginning requests", begin, none, always=True)
        if agent.leads:
            agent.cached_kv.before_prefill(batch)
        if agent.leads and not agent.guard(
            "recording prefills", lambda: agent.observe_prefill(batch, new, target_hidden_states)
        ):
            agent.prefill = None
            agent.let_go_of(batch)
    places = batch.out_cache_loc
    result = original(drafter, batch, target_hidden_states, *args, **kw)
    if agent is not None:
        agent.cached_kv.after_prefill(batch, places)
    return result


def _verify(original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kw: Any) -> Any:
    verify_input, agent = batch.spec_info, _agent
    if agent is not None:
        withhold = partial(agent.no_drafts.withhold, batch, verify_input)
        agent.guard("withholding drafts", withhold, always=True)
    result = original(worker, batch, *args, **kw)
    if agent is not None and agent.leads and not batch.forward_mode.is_idle():
        plain = int(verify_input.draft_token_num) == 1 and not agent.step_shape.keeps_kv
        agent.cached_kv.after_step(batch.out_cache_loc, plain=plain)
        batch_spec_info, batch.spec_info = batch.spec_info, verify_input
        agent.guard("recording verify steps", lambda: agent.observe_verify(batch, result))
        batch.spec_info = batch_spec_info
    return result


def _eagle_sample(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """Until SGLang 0.5.20 the accepted nodes are not in the step's result."""
    if _agent is not None:
        from aurora_sgl.engine import one_token

        process = partial(one_token.process_logits, *args[:3])
        _agent.guard("applying logit processors", process, always=True)
    sample = original(*args, **kw)
    if _agent is not None:
        _agent.accept_index = sample[2]
    return sample


def _verify_tree_greedy_func(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    if _agent is not None:
        _agent.target_predict = kw.get("target_predict", args[7] if len(args) > 7 else None)
    return original(*args, **kw)


def _process_logits(
    original: Callable[..., Any],
    processor: Any,
    input_ids: Any,
    hidden_states: Any,
    *args: Any,
    **kw: Any,
) -> Any:
    from aurora_sgl.engine.capture import keep_last

    keep_last(processor, hidden_states, kw.get("logits_metadata", args[1] if args[1:] else None))
    return original(processor, input_ids, hidden_states, *args, **kw)


def _process_batch_result_decode(
    original: Callable[..., Any], processor: Any, batch: Any, result: Any, *args: Any, **kw: Any
) -> Any:
    agent = _agent
    if agent is None or not agent.leads:
        return original(processor, batch, result, *args, **kw)
    states = [getattr(req, "_aurora", None) for req in batch.reqs]
    tracked = agent.parts.attempt(
        "recording results", lambda: agent.before_decode_results(batch), None
    )
    out = original(processor, batch, result, *args, **kw)
    if tracked is None or not agent.guard(
        "recording results", lambda: agent.after_decode_results(batch, result, tracked)
    ):
        agent.let_go(states)
    return out


def _process_batch_result_prefill(
    original: Callable[..., Any], processor: Any, batch: Any, result: Any, *args: Any, **kw: Any
) -> Any:
    out = original(processor, batch, result, *args, **kw)
    agent = _agent
    if (
        agent is not None
        and agent.leads
        and not agent.guard(
            "recording prefill results", lambda: agent.after_prefill_results(batch, result)
        )
    ):
        agent.let_go_of(batch)
    return out


def _pull_raw_reqs(original: Callable[..., Any], receiver: Any, *args: Any, **kw: Any) -> Any:
    recv_reqs = original(receiver, *args, **kw)
    agent = _agent
    if agent is not None and agent.leads:
        agent.guard("choosing drafts", lambda: agent.choose(recv_reqs))
        agent.guard("talking to the sidecar", lambda: agent.poll(recv_reqs))
    if agent is None:
        _poll_herald()
    return recv_reqs


def _process_input_requests(
    original: Callable[..., Any], scheduler: Any, recv_reqs: list[Any], *args: Any, **kw: Any
) -> Any:
    from aurora_sgl.engine import swap_driver

    agent = _agent
    try:
        renewing = _take_plans(agent, recv_reqs)
    except Exception:  # whose plans are lost are served as if nothing had been chosen
        renewing = set()
        logger.exception("aurora: what was chosen for requests is lost; serving goes on")
    ours = [one for one in recv_reqs if isinstance(one, swap_driver.COMMANDS)]
    rest = [one for one in recv_reqs if not isinstance(one, swap_driver.COMMANDS)]
    if agent is None:
        for command in ours:  # on a rank where we could not start; the others wait for its word
            swap_driver.abstain(command)
        _agent_of_scheduler(scheduler)
        return original(scheduler, rest, *args, **kw)
    agent.swaps.forward_stream = getattr(scheduler, "forward_stream", None)
    agent.queue = len(getattr(scheduler, "waiting_queue", ()))
    for command in ours:
        agent.guard("swapping", partial(agent.swaps.obey, command), always=True)
    idle = getattr(scheduler, "last_batch", scheduler) is None and not rest
    agent.guard("swapping", partial(agent.swaps.work, idle=idle), always=True)
    out = original(scheduler, rest, *args, **kw)
    if renewing:
        take_out = partial(agent.cached_kv.take_out, scheduler, renewing)
        agent.guard("renewing draft KV", take_out, always=True)
    return out


def _take_plans(agent: Agent | None, recv_reqs: list[Any]) -> set[str]:
    """Keep what was chosen for new requests, and what they say. Returns those that renew their
    head of the cache."""
    from aurora_sgl.engine import labels, plan

    renewing: set[str] = set()
    for request in plan.requests(recv_reqs):
        # Without an agent too: SGLang must not meet what we put there.
        chosen, request_labels = plan.take(request), labels.take(request.sampling_params)
        if agent is None:
            continue
        if chosen is None:
            agent.plans.keep_unchosen(request.rid, request_labels)
            continue
        agent.plans.keep(request.rid, chosen)
        if chosen.renews:
            renewing.add(request.rid)
    return renewing


def _agent_of_scheduler(scheduler: Any) -> None:
    """Start before the first request, so that a quiet server is known to the store too."""
    worker = getattr(scheduler, "model_worker", None) or getattr(scheduler, "draft_worker", None)
    for candidate in (worker, getattr(scheduler, "draft_worker", None)):
        if type(candidate).__name__ == _WORKER:
            _agent_of(candidate)
            return


def _verify_uses_greedy(
    *, is_all_greedy: bool, is_xpu: bool, is_hip: bool, use_rejection_sampling: bool, **rest: Any
) -> bool:
    """SGLang answers every request greedily on CPU; with our sampling kernels it need not."""
    return is_all_greedy or is_xpu or (is_hip and not use_rejection_sampling)
