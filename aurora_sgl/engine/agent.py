"""What Aurora does inside one scheduler process: one object that the hooks of plugin.py call.

It owns the channel to the sidecar, the recorder, the capture, the speculation policy and the
swapper. Everything here runs in the scheduler's only thread, except staging and reading back.
Whatever goes wrong here is logged once and switched off: serving goes on.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aurora_sgl import wire
from aurora_sgl.config import get_settings
from aurora_sgl.drafter.checkpoint import WEIGHTS
from aurora_sgl.engine import labels, ladder
from aurora_sgl.engine.capture import Capture, LastHiddenState
from aurora_sgl.engine.channel import Channel
from aurora_sgl.engine.companion import ENDPOINT_VARIABLE
from aurora_sgl.engine.policy import TRY_STEPS, Admission, SpeculationPolicy
from aurora_sgl.engine.recorder import (
    Recorder,
    RequestState,
    VerifyObservation,
    new_boot_id,
    to_host,
)
from aurora_sgl.engine.swap import Swapper
from aurora_sgl.engine.swap_driver import SwapDriver

logger = logging.getLogger("aurora_sgl")

#: (request, state, first position, first row, rows) of each traced request of a prefill, and the
#: rows on the CPU, or on their way there.
Prefill = tuple[
    list[tuple[Any, RequestState, int, int, int]], torch.Tensor | None, torch.Tensor | None
]

_HELLO_SECONDS = 2.0
_MOST_KEEPING = 4096  # requests that were aborted before their prefill stay in the set


class Agent:
    """Created by the first hook that sees the EAGLE worker."""

    def __init__(self, worker: Any, description: dict[str, Any], *, leads: bool) -> None:
        settings = get_settings()
        self.worker = worker
        self.leads = leads  # of a tensor-parallel group one rank records and talks to the sidecar
        self.boot_id = new_boot_id()
        self.description = description
        endpoint = os.environ.get(ENDPOINT_VARIABLE, "")
        self.channel = (
            Channel(
                Path(endpoint) / str(description["dp_rank"]), self.boot_id, settings.record_buffer
            )
            if leads and endpoint and settings.record
            else None
        )
        self.recorder = Recorder(
            self.boot_id,
            train_by_default=settings.train_by_default,
            capture_share=settings.capture_share if self.channel else 0.0,
            dp_rank=int(description.get("dp_rank", 0)),
        )
        can_skip = bool(description["plain_steps_possible"])
        share = {"on": 1.0, "off": 0.0, "auto": settings.explore_share}[settings.speculation]
        by_size = can_skip and settings.speculation == "auto"
        # What steps take differs by rank, and all ranks must make the same step.
        self.may_drop = by_size and int(description["tp_size"]) == 1
        shape = ladder.Rung(int(description["depth"]), int(description["nodes"]))
        may_shrink = self.may_drop and str(description["device"]) == "cpu"
        topk = int(description["topk"])
        self.ladder = ladder.Ladder(worker, shape)
        self.policy = SpeculationPolicy(
            share if can_skip else 1.0,
            by_size=by_size,
            explore_share=settings.explore_share,
            rungs=ladder.rungs(shape.depth, topk, shape.nodes) if may_shrink else (shape,),
        )
        self._keeping: dict[str, float] = {}  # id of a request, until prefilled -> steps
        self.can_skip = can_skip
        target_model = worker.target_worker.model_runner.model
        self.capture = Capture(self.channel, self.boot_id) if self.channel else None
        self.last_hidden = (
            LastHiddenState.of(target_model.logits_processor)
            if self.capture and hasattr(target_model, "logits_processor")
            else None
        )
        swapper = Swapper(
            worker.draft_worker.draft_runner.model,
            target_model,
            worker.draft_worker.hot_token_id,
            worker.target_worker.model_config.vocab_size,
        )
        self._done: list[wire.Record] = []  # filled by the read-back thread, one append each
        self.swaps = SwapDriver(
            swapper,
            self.recorder.live,
            self.boot_id,
            tp_size=int(description["tp_size"]),
            report=self._done.append if self.channel else None,
        )
        # What hooks inside a step leave for the one around it.
        self.target_predict: torch.Tensor | None = None
        self.accept_index: torch.Tensor | None = None
        self.prefill: Prefill | None = None
        self.queue = 0  # requests that wait to be prefilled
        self.notices: dict[str, str] = {}  # see wire.Hello
        self._said_hello = 0.0
        self._failed_parts: set[str] = set()
        drafter = Path(str(description.get("drafter_path") or "."))
        if self.channel is not None and (drafter / WEIGHTS).exists():
            description["live_sha256"] = self.swaps.read_back_at_start(drafter)

    # -- safety ------------------------------------------------------------------------------

    def guard(self, part: str, work: Callable[[], None]) -> None:
        """Run our own work; on an error log it once and never run that part again."""
        if part in self._failed_parts:
            return
        try:
            work()
        except Exception:
            self._failed_parts.add(part)
            logger.exception("aurora: %s failed and is switched off; serving goes on", part)

    # -- the step ----------------------------------------------------------------------------

    def step_rung(self, batch: Any) -> ladder.Rung:
        """The shape of this decode step's drafts."""
        if not self.can_skip:
            return self.ladder.whole
        size = len(batch.reqs)
        states = [getattr(req, "_aurora", None) for req in batch.reqs]
        drafting = [state for state in states if state is not None and state.speculates]
        if drafting and self.may_drop and not self.policy.keeps(size):
            for state in drafting:
                state.speculates = state.keeps > 0
                state.keeps -= 1
            drafting = [state for state in drafting if state.speculates]
        if any(state.whole for state in drafting):
            return self.ladder.whole
        return self.policy.rung(size) if drafting else ladder.PLAIN

    def account_step(self, batch_size: int, *, rung: ladder.Rung, seconds: float) -> None:
        self.recorder.live.steps_since_swap += 1
        self.policy.swapped(self.recorder.live.swap_count)
        self.policy.account(rung=rung, batch_size=batch_size, seconds=seconds)

    def observe_prefill(self, batch: Any, aux: torch.Tensor | None) -> None:
        """After the target's prefill, on every rank: admit requests; on the leading one also take
        references to hidden states."""
        total = sum(batch.extend_lens)
        last = self.last_hidden.take(total) if self.last_hidden and aux is not None else None
        if self.capture and aux is not None:
            self.capture.learn_layout(aux, last)
        pieces = []
        records: list[wire.Record] = []
        at = 0
        for row, req in enumerate(batch.reqs):
            rows = batch.extend_lens[row]
            if not hasattr(req, "_aurora"):
                chosen = str(getattr(req, "extra_key", None) or "")  # see _admit
                admitted = self.recorder.admit(
                    req,
                    speculates=_DRAFTS in chosen,
                    traced=self.capture is not None and chosen.endswith(_TRACED),
                    follow=self.leads,
                    keeps=self._keeping.pop(req.rid, 0.0),
                )
                if admitted is not None:
                    records.append(admitted[1])
                    if admitted[0].traced and self.capture:
                        self.capture.begin(req, admitted[0])
            state: RequestState | None = req._aurora
            if state is not None and state.traced:
                pieces.append((req, state, batch.prefix_lens[row], at, rows))
            at += rows
        if records and self.channel:
            self.channel.put(records)
        if pieces and aux is not None and aux.shape[0] == total:
            self.prefill = (pieces, to_host(aux), to_host(last) if last is not None else None)

    def _admit(self, recv_req: Any, batch_size: int) -> None:
        """Before a request is queued: choose what is done with it, and its cache namespace.

        The choice travels in the namespace, so that all ranks make the same one.

        Draft KV in the prefix cache was made by the drafter of its time. A namespace per live
        version keeps every request's draft KV of one version. Requests that are served without
        drafts, whose answers have no draft KV, leave nothing that a drafting one would reuse; and
        what a traced request finds in the cache was traced too, so that no prefix is unknown.
        """
        said = labels.read(recv_req.sampling_params)
        wish = said.speculate if self.can_skip else True
        if wish is None:
            admission = self.policy.admit(batch_size)
            speculates = admission is not Admission.PLAIN
            keeps = float(TRY_STEPS) if admission is Admission.TRIES else 0.0
        else:
            speculates, keeps = wish, math.inf
        if speculates and keeps and len(self._keeping) < _MOST_KEEPING:
            self._keeping[recv_req.rid] = keeps
        traced = self.capture is not None and self.recorder.choose_to_trace(said)
        key = f"aurora:{self.recorder.live.swap_count}"
        key += f"{_DRAFTS if speculates else ''}{_TRACED if traced else ''}"
        recv_req.extra_key = f"{recv_req.extra_key or ''}{key}"

    def observe_verify(self, batch: Any, result: Any) -> None:
        """After the verify forward: take references to what records need."""
        verify_input = batch.spec_info
        accept_index, self.accept_index = self.accept_index, None
        if accept_index is None or not batch.reqs:
            return
        nodes = int(verify_input.draft_token_num)
        size = len(batch.reqs)
        traced = self.capture is not None and any(
            getattr(req, "_aurora", None) is not None and req._aurora.traced for req in batch.reqs
        )
        hidden = result.logits_output.hidden_states if traced else None
        last = None
        if traced and self.last_hidden:
            from_graph = bool(result.can_run_cuda_graph)
            last = self.last_hidden.take(size * nodes, from_graph=from_graph)
        live = self.recorder.live
        predict, self.target_predict = self.target_predict, None
        result.aurora_verify = VerifyObservation(
            draft_token=to_host(verify_input.draft_token.reshape(size, nodes)),
            first_child=to_host(verify_input.retrieve_next_token),
            next_sibling=to_host(verify_input.retrieve_next_sibling),
            accept_index=to_host(accept_index),
            target_predict=to_host(predict.reshape(size, nodes)) if predict is not None else None,
            depth=0 if nodes == 1 else int(self.worker.speculative_num_steps),
            topk=1 if nodes == 2 else int(self.worker.topk),  # one draft is a chain
            nodes=nodes,
            version_id=live.version_id,
            swap_count=live.swap_count,
            swap_age=live.steps_since_swap,
            rejection_sampling=bool(self.description.get("rejection_sampling")),
            aux=to_host(hidden) if hidden is not None else None,
            last=to_host(last) if last is not None else None,
        )

    def before_decode_results(self, batch: Any) -> list[tuple[int, Any, RequestState, int]]:
        """Requests of the batch whose step counts, as SGLang itself counts it."""
        tracked = []
        for row, req in enumerate(batch.reqs):
            state = getattr(req, "_aurora", None)
            if state is not None and not req.finished() and not req.is_retracted:
                tracked.append((row, req, state, len(req.output_ids)))
        return tracked

    def after_decode_results(
        self, batch: Any, result: Any, tracked: list[tuple[int, Any, RequestState, int]]
    ) -> None:
        seen: VerifyObservation | None = getattr(result, "aurora_verify", None)
        if seen is None or not tracked:
            return
        accept_lens = result.accept_lens.tolist()
        records = self.recorder.verify_steps(batch, seen, accept_lens, tracked)
        if seen.depth > 0:
            whole = [
                accept_lens[row] - 1
                for row, _, state, _ in tracked
                if not state.holes and state.swap_count == seen.swap_count
            ]
            rung = ladder.Rung(seen.depth, seen.nodes)
            self.policy.observe(seen.swap_count, rung, len(whole), sum(whole))
        for row, req, state, before in tracked:
            if state.traced and self.capture and seen.aux is not None:
                self.capture.verify_rows(req, state, row, before, accept_lens[row], seen)
            if req.finished():
                records.append(self._finish(req, state))
        if self.channel:
            self.channel.put(records)

    def after_prefill_results(self, batch: Any, result: Any) -> None:
        observed: Prefill = getattr(result, "aurora_prefill", None) or ([], None, None)
        pieces, aux, last = observed
        for req, state, start, at, rows in pieces:
            if self.capture and aux is not None and not req.is_retracted:
                part = slice(at, at + rows)
                self.capture.prompt_rows(
                    req, state, start, aux[part], last[part] if last is not None else None
                )
        finished = [
            self._finish(req, req._aurora)
            for req in batch.reqs
            if getattr(req, "_aurora", None) is not None
            and req.finished()
            and req.inflight_middle_chunks <= 0
        ]
        if finished and self.channel:
            self.channel.put(finished)

    def _finish(self, req: Any, state: RequestState) -> wire.Record:
        if state.traced and self.capture:
            self.capture.end(req, state)
        record = self.recorder.finish(req, state)
        req._aurora = None
        return record

    # -- the sidecar -------------------------------------------------------------------------

    def poll(self, recv_reqs: list[Any] | None) -> None:
        """Between two steps, on the leading rank, before what was received goes to all ranks:
        choose what is done with new requests, send what waits, take commands."""
        size = self.recorder.running + self.queue
        for received in recv_reqs or ():
            name = type(received).__name__
            if name == "TokenizedGenerateReqInput":
                size += 1
                self._admit(received, size)
            elif name == "BatchTokenizedGenerateReqInput":
                for one in received:
                    size += 1
                    self._admit(one, size)
        if self.channel is None:
            return
        now = time.monotonic()
        if now - self._said_hello >= _HELLO_SECONDS:
            self._said_hello = now
            vanished = self.recorder.vanished()
            self.channel.put([self.hello(), *vanished])
        while self._done:
            self.channel.put([self._done.pop(0)])
        self.channel.flush()
        command = self.channel.receive()
        if command is not None:
            self._obey(command)
        if recv_reqs is not None:
            ours = self.swaps.next_command()
            if ours is not None:
                recv_reqs.append(ours)

    def hello(self) -> wire.Hello:
        assert self.channel is not None
        counters = {
            "running_requests": float(self.recorder.running),
            "waiting_records": float(self.channel.waiting_records),
            "dropped_traces": float(self.channel.dropped_traces),
            "speculation_share": self.policy.share,
            "capture_share": self.recorder.capture_share,
            "queue": float(self.queue),
            **{name: float(self.description[name]) for name in ("depth", "topk", "nodes")},
            **self.policy.counters(),
        }
        return wire.Hello(
            boot_id=self.boot_id,
            pid=os.getpid(),
            server=self.description,
            live_version_id=self.recorder.live.version_id,
            swap_count=self.recorder.live.swap_count,
            dropped=self.channel.dropped_records,
            counters=counters,
            notices=dict(self.notices),
        )

    def _obey(self, command: wire.Command) -> None:
        if isinstance(command, wire.Identify):
            if self.recorder.live.swap_count == 0:
                self.recorder.live.version_id = command.version_id
        elif isinstance(command, wire.SetPhase):
            if self.can_skip:
                self.policy.swapped(self.recorder.live.swap_count)
                self.policy.share = command.share
                self.policy.hoped = command.accept_length or None
        elif isinstance(command, wire.SetCapture):
            self.recorder.capture_share = command.share
        else:
            self.swaps.ask(command)


_DRAFTS = ":drafts"
_TRACED = ":traced"
