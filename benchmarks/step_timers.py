"""Timers inside the scheduler, for ``cpu_step.py``: an SGLang plugin of the benchmark's own.

Every hooked call charges the time since the last mark to the part that was running, so the parts
are exclusive and add up to the step. One line of JSON a step goes to the file that the variable
``AURORA_BENCH_STEPS`` names. On every eighth step the parts' memory traffic and arithmetic are
counted instead, and that step is not timed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "AURORA_BENCH_STEPS"
CLOCK = "AURORA_BENCH_CLOCK"  # cpu | wall
_COUNT_EVERY = 8

_LAYERS = "sglang.srt.layers."
_EAGLE = "sglang.srt.speculative.eagle_worker_v2."
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."
_AGENT = "aurora_sgl.engine.agent.Agent."

PARTS = {
    # Compiled on CPU; the parts that follow are timed where a layer goes SGLang's own way.
    "aurora_sgl.engine.cpu.layers._run": "layers",
    "aurora_sgl.engine.cpu.layer.run": "layers",
    f"{_LAYERS}quantization.unquant.UnquantizedLinearMethod.apply": "linears",
    f"{_LAYERS}logits_processor.LogitsProcessor._compute_lm_head": "lm_head",
    f"{_LAYERS}layernorm.RMSNorm.forward": "norms",
    f"{_LAYERS}rotary_embedding.base.RotaryEmbedding.forward": "rotary",
    f"{_LAYERS}activation.SiluAndMul.forward": "activation",
    f"{_LAYERS}radix_attention.RadixAttention.forward": "attention",
    **{
        f"{_AGENT}{name}": "our hooks"
        for name in (
            "step_rung",
            "account_step",
            "observe_verify",
            "before_decode_results",
            "after_decode_results",
            "poll",
        )
    },
}
PHASES = {
    f"{_EAGLE}EagleDraftWorker.draft": "draft steps",
    f"{_EAGLE}EagleDraftWorker._draft_extend_for_decode": "draft extend",
    f"{_EAGLE}EAGLEWorkerV2.verify": "target",
}
REST = "other Python"  # of a phase: SGLang's modules between the parts
SCHEDULER = "scheduler"


class Timers:
    """A stack of running parts; :meth:`enter` and :meth:`leave` charge the one on top."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._stack = [(SCHEDULER, SCHEDULER)]
        self._last = clock()
        self._spent: dict[tuple[str, str], float] = defaultdict(float)
        self._work: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._steps = 0
        self.counted = 0  # parts whose work was counted so far

    @property
    def counting(self) -> bool:
        return self._steps % _COUNT_EVERY == 0

    def enter(self, phase: str | None, part: str) -> None:
        now = self._clock()
        self._spent[self._stack[-1]] += now - self._last
        self._stack.append((phase or self._stack[-1][0], part))
        self._last = now

    def leave(self) -> None:
        now = self._clock()
        self._spent[self._stack.pop()] += now - self._last
        self._last = now

    def work(self, traffic: float, operations: float) -> None:
        """Bytes and floating-point operations of the part that runs now."""
        done = self._work[self._stack[-1]]
        done[0] += traffic
        done[1] += operations
        self.counted += 1

    def end_step(self, batch: int, decode: bool) -> None:
        now = self._clock()
        self._spent[self._stack[-1]] += now - self._last
        row: dict[str, Any] = {"batch": batch, "decode": decode, "counted": self.counting}
        held: dict[tuple[str, str], Any] = self._work if self.counting else self._spent
        row["parts"] = [[*key, value] for key, value in held.items()]
        with self._path.open("a") as out:
            out.write(json.dumps(row) + "\n")
        self._spent.clear()
        self._work.clear()
        self._steps += 1
        self._last = self._clock()


def _bytes(*tensors: Any) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors if hasattr(t, "element_size")))


def _count(timers: Timers, part: str, args: tuple[Any, ...], out: Any) -> None:
    first = out[0] if isinstance(out, tuple) else out
    if part == "linears":
        weight, x = args[1].weight, args[2]
        rows = x.numel() // x.shape[-1]
        timers.work(_bytes(weight, x, out), 2.0 * rows * weight.numel())
    elif part == "layers":
        layers = getattr(args[0], "layers", args[0])
        weights = [weight for weight in layers.parameters() if weight.dim() == 2]
        operations = 2.0 * first.shape[0] * sum(weight.numel() for weight in weights)
        timers.work(_bytes(*weights, first), operations)
    elif part == "lm_head":
        weight, x = args[2].weight, args[1]
        timers.work(_bytes(weight, x, out), 2.0 * x.shape[0] * weight.numel())
    elif part == "attention":
        layer, q, forward = args[0], args[1], args[4]
        queries = q.numel() / (layer.tp_q_head_num * layer.qk_head_dim)
        seen = float(forward.seq_lens.sum())
        per_token = layer.tp_k_head_num * (layer.qk_head_dim + layer.v_head_dim)
        each = queries / max(1, forward.batch_size)
        timers.work(
            _bytes(q, first) + seen * per_token * q.element_size(),
            2.0 * seen * each * layer.tp_q_head_num * (layer.qk_head_dim + layer.v_head_dim),
        )
    else:
        timers.work(_bytes(*args[1:], first), 4.0 * first.numel())


def _timed(timers: Timers, phase: str | None, part: str, *, counted: bool) -> Callable[..., Any]:
    def around(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        timers.enter(phase, part)
        before = timers.counted
        try:
            out = original(*args, **kw)
            # What parts inside it counted is not counted again.
            if counted and timers.counting and timers.counted == before and out is not None:
                _count(timers, part, args, out)
            return out
        finally:
            timers.leave()

    return around


def register() -> None:
    """The plugin's entry point: hooks in the scheduler process only."""
    path = os.environ.get(FILE)
    if not path or multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    wall = os.environ.get(CLOCK) == "wall"
    timers = Timers(Path(path), time.perf_counter if wall else time.thread_time)
    for name, part in PARTS.items():
        counted = part != "our hooks"
        hook = _timed(timers, None if counted else "our hooks", part, counted=counted)
        HookRegistry.register(name, hook, HookType.AROUND)
    for name, phase in PHASES.items():
        HookRegistry.register(name, _timed(timers, phase, REST, counted=False), HookType.AROUND)

    def results_processed(result: Any, scheduler: Any, batch: Any, *args: Any, **kw: Any) -> None:
        mode = batch.forward_mode
        timers.end_step(len(batch.reqs), not mode.is_extend() and not mode.is_idle())

    HookRegistry.register(f"{_SCHEDULER}process_batch_result", results_processed, HookType.AFTER)
