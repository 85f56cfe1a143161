"""What Aurora does inside one scheduler process: one object that the hooks of plugin.py call.

It owns the channel to the sidecar, the recorder, the capture, the speculation policy and the
swapper. Everything here runs in the scheduler's only thread, except packing weights (see ``swap``).
Whatever goes wrong here, serving goes on: see ``parts``.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from aurora_sgl import environment, wire
from aurora_sgl.config import Settings, get_settings
from aurora_sgl.draft_shape import NO_DRAFT, DraftShape
from aurora_sgl.drafter.checkpoint import WEIGHTS
from aurora_sgl.engine import clean, shadows, startup, unknown
from aurora_sgl.engine.cached_kv import CachedKV
from aurora_sgl.engine.capture import Capture, Gathered, LastHiddenState
from aurora_sgl.engine.channel import Channel
from aurora_sgl.engine.consent import Consent
from aurora_sgl.engine.conversations import Conversations, Place
from aurora_sgl.engine.cpu.growing_tree import GrowingTree
from aurora_sgl.engine.draft_tree import StepRows, VerifyObservation, rows_to_host, to_host
from aurora_sgl.engine.labels import Labels
from aurora_sgl.engine.one_token import NoDrafts
from aurora_sgl.engine.parts import Parts
from aurora_sgl.engine.plan import Plans, RequestPlan, put, requests
from aurora_sgl.engine.policy import TRY_STEPS, Admission, SpeculationPolicy
from aurora_sgl.engine.recorder import Recorder, new_boot_id
from aurora_sgl.engine.request_state import RequestState
from aurora_sgl.engine.samples import Prompts
from aurora_sgl.engine.step_shape import StepShape, shapes_within
from aurora_sgl.engine.swap import Swapper
from aurora_sgl.engine.swap_driver import SwapDriver
from aurora_sgl.engine.tree_choice import TreePolicy
from aurora_sgl.trace_format import row_bytes

logger = logging.getLogger("aurora_sgl")

#: (request, state, first position, first row, rows) of each traced request of a prefill, and the
#: rows on the CPU, or on their way there.
Prefill = tuple[list[tuple[Any, RequestState, int, int, int]], torch.Tensor, torch.Tensor | None]

_HELLO_SECONDS = 2.0
#: Without a sidecar for so long the policy decides by itself, as often as the sidecar would.
ALONE_SECONDS = 30.0
_DECIDE_SECONDS = 5.0
_LONGEST_PATH = 4096
_TRACED = "|aurora:traced"  # behind the client's own key of the prefix cache
_A_REQUEST = "recording a request"


class Agent:
    """Created by the first hook that sees the EAGLE worker."""

    def __init__(self, worker: Any, description: dict[str, Any], *, leads: bool) -> None:
        settings = get_settings()
        self.worker = worker
        self.leads = leads  # of a tensor-parallel group one rank records and talks to the sidecar
        self.boot_id = new_boot_id()
        self.description = description
        endpoint = environment.value(environment.ENDPOINT)
        self.channel = (
            Channel(
                Path(endpoint) / str(description["dp_rank"]), self.boot_id, settings.record_buffer
            )
            if leads and endpoint and settings.record
            else None
        )
        no_artifacts = startup.no_artifacts()
        captures = self.channel is not None and not no_artifacts
        self.recorder = _recorder(settings, self.boot_id, description, captures=captures)
        can_skip = bool(description["plain_steps_possible"])
        share = {"on": 1.0, "off": 0.0, "auto": settings.explore_share}[settings.speculation]
        by_size = can_skip and settings.speculation == "auto"
        # What steps take differs by rank, and all ranks must make the same step.
        self.may_drop = by_size and int(description["tp_size"]) == 1
        whole = DraftShape(*(int(description[name]) for name in ("depth", "topk", "nodes")))
        may_shrink = self.may_drop and str(description["device"]) == "cpu"
        grows = may_shrink and _grows(settings, whole)
        self.step_shape = StepShape(worker, whole)
        self.may_probe = self.may_drop and self.step_shape.can_keep_kv
        self.policy = SpeculationPolicy(
            share if can_skip else 1.0,
            by_size=by_size,
            explore_share=settings.explore_share,
            shapes=shapes_within(whole) if may_shrink and not grows else (whole,),
        )
        self.can_skip = can_skip
        self.plans = Plans(RequestPlan(speculates=not can_skip))
        target_model = worker.target_worker.model_runner.model
        self.capture = (
            Capture.of(settings, self.channel.send_traces, self.boot_id, row_bytes(description))
            if self.channel
            else None
        )
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
            swaps=bool(endpoint) and settings.record,
            reserved=shadows.take(worker),
        )
        self._done: list[wire.Record] = []
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
        self.notices = startup.notices_of_start()  # see wire.Hello
        self.no_drafts = NoDrafts(worker, description, self.notices)
        self.parts = Parts(self.notices)
        self.trees = GrowingTree(self.step_shape, TreePolicy(whole), self.parts) if grows else None
        self.consent = Consent(self.notices)
        self.conversations = Conversations()
        self.prompts = Prompts()
        self.cached_kv = CachedKV(worker, self.recorder.live, self.parts)
        self._said_hello = 0.0
        self._sidecar_heard = time.monotonic() if self.channel else -math.inf
        self._alone_at = 0.0  # when the policy last decided by itself
        if self.channel is not None:
            self._know_drafter(Path(str(description.get("drafter_path") or ".")), no_artifacts)

    def _know_drafter(self, folder: Path, no_artifacts: str) -> None:
        """Which drafter runs: by the hash of its weights, read back from the model."""
        try:
            unusual = no_artifacts or unknown.why(self.worker, folder)
            if not unusual and (folder / WEIGHTS).exists():
                self.description["live_sha256"] = self.swaps.read_back_at_start(folder)
        except Exception as error:  # such as a GPU without the memory for a copy
            unusual = clean.text(f"it can't be read back: {error}".splitlines()[0], 300)
        if unusual:
            self.description["unknown_drafter"] = unusual
            logger.warning(
                "aurora: the drafter of this server is unknown: %s; requests are recorded without "
                "a version, and no version goes live here",
                unusual,
            )

    # -- safety ------------------------------------------------------------------------------

    def guard(self, part: str, work: Callable[[], None], *, always: bool = False) -> bool:
        """Run our own work; false when it failed, or is left alone after a failure."""

        def done() -> bool:
            work()
            return True

        return self.parts.attempt(part, done, False, always=always)

    def let_go(self, states: Iterable[RequestState | None]) -> None:
        """Record these requests no further: something of theirs was missed."""
        gone = [state for state in states if state is not None]
        lost = [self.recorder.let_go(state) for state in gone]
        for state in gone:
            self.conversations.hold(state.turn)
        self._forget(gone, "lost")
        if self.channel is not None:
            self._done += [record for record in lost if record is not None]

    def _forget(self, gone: Iterable[RequestState | wire.RequestFinished], reason: str) -> None:
        """Trace these requests no further."""
        if self.capture is not None:
            for one in gone:
                self.capture.let_go(one.request_id, reason)

    def let_go_of(self, batch: Any) -> None:
        self.let_go(getattr(req, "_aurora", None) for req in batch.reqs)

    # -- the step ----------------------------------------------------------------------------

    def choose_shape(self, batch: Any) -> DraftShape:
        """The shape of this decode step's drafts."""
        if not self.can_skip:
            return self.step_shape.whole
        size = len(batch.reqs)
        states = [getattr(req, "_aurora", None) for req in batch.reqs]
        if self.trees is not None:
            self.trees.forget()
        drafting = [state for state in states if state is not None and state.speculates]
        whole = any(state.whole for state in drafting)
        if drafting and self.may_probe and not whole and self.policy.probes(size):
            self.step_shape.keeps_kv = True
            return NO_DRAFT
        if drafting and self.may_drop and not self.policy.keeps(size):
            for state in drafting:
                state.speculates = state.keeps > 0
                state.keeps -= 1
            drafting = [state for state in drafting if state.speculates]
        if whole:  # such requests keep their drafts
            return self.step_shape.whole
        if drafting and self.trees is not None:
            self.trees.begin(states)
        return self.policy.shape(size) if drafting else NO_DRAFT

    def account_step(self, batch_size: int, *, shape: DraftShape, seconds: float) -> None:
        self.recorder.live.steps_since_swap += 1
        if self.policy.swapped(self.recorder.live.swap_count) and self.trees is not None:
            self.trees.policy.swapped()
        needed = seconds - self.step_shape.kv_seconds
        if self.trees is not None:
            needed = self.trees.done(needed)
        self.policy.account(shape=shape, batch_size=batch_size, seconds=needed)
        if self.capture is not None:
            self.capture.budget.stepped(seconds)

    def begin(self, batch: Any) -> list[Any]:
        """At the target's prefill, on every rank: what was chosen for the batch's new requests
        takes effect. Returns those."""
        new = [req for req in batch.reqs if not hasattr(req, "_aurora")]
        for req in new:
            req._aurora = None
            try:
                self.no_drafts.begin(req)
                plan, prompt = self.plans.pop(req.rid), self.prompts.take(req.rid)
                state = self.recorder.begin(req, plan, follow=self.leads, prompt=prompt)
                if state is not None:
                    state.ticket = plan.ticket
                    if req._aurora_no_drafts:
                        state.go_without_drafts(req._aurora_no_drafts)
            except Exception as error:
                self.parts.failed(_A_REQUEST, error)
        return new

    def observe_prefill(self, batch: Any, new: list[Any], aux: torch.Tensor | None) -> None:
        """After that, on the leading rank: record new requests, take references to hidden
        states."""
        total = sum(batch.extend_lens)
        last = self.last_hidden.take(total) if self.last_hidden and aux is not None else None
        if self.capture and aux is not None:
            self.capture.learn_layout(aux, last)
        records = [record for req in new for record in self._started(req)]
        if records and self.channel:
            self.channel.put(records)
        pieces = []
        offset = 0
        for row, req in enumerate(batch.reqs):
            rows = batch.extend_lens[row]
            state: RequestState | None = req._aurora
            if state is not None and state.trace is not None and not state.trace.broken:
                pieces.append((req, state, batch.prefix_lens[row], offset, rows))
            offset += rows
        if pieces and aux is not None and aux.shape[0] == total:
            parts = [(offset, rows) for _, _, _, offset, rows in pieces]
            kept = rows_to_host(last, parts) if last is not None else None
            if aux.device.type != "cpu":  # there only these rows come to the host
                ends = accumulate(rows for _, rows in parts)
                pieces = [
                    (*one[:3], end - one[4], one[4]) for one, end in zip(pieces, ends, strict=True)
                ]
            self.prefill = (pieces, rows_to_host(aux, parts), kept)

    def _started(self, req: Any) -> list[wire.Record]:
        state: RequestState | None = req._aurora
        if state is None:
            return []
        try:
            if state.traced and self.capture and state.trace is None:
                self.capture.begin(req, state, state.ticket)
            state.traced = state.trace is not None
            if state.labels.prompt_of is not None:
                if state.traced:
                    self.prompts.begin(req, state)
                return []
            record = self.recorder.started(req, state)
            state.recorded = True
        except Exception as error:
            self.parts.failed(_A_REQUEST, error)
            self.let_go([state])
            return []
        return [record]

    def choose(self, recv_reqs: list[Any] | None) -> None:
        """On the leading rank, before what was received goes to all ranks: choose what is done
        with new requests."""
        size = self.recorder.running + self.queue
        for more, received in enumerate(requests(recv_reqs or ()), 1):
            try:
                self._choose(received, size + more)
            except Exception as error:  # this one is served without drafts, the others as ever
                self.parts.failed("choosing drafts", error)

    def _choose(self, recv_req: Any, batch_size: int) -> None:
        """Choose what is done with a request, before it is queued.

        The prefix cache is one for all drafters, and for requests with drafts and without: a place
        whose draft KV is of another drafter, or missing, costs acceptance only, and the record
        says so (see ``draft_kv``). Captured requests have a part of their own, so that what they
        find there was captured too, and no prefix is unknown to training.
        """
        labels = self.consent.take(recv_req)
        wish = labels.speculate if self.can_skip else True
        if self.no_drafts.applies(recv_req):
            wish = not (self.can_skip or self.no_drafts.can_withhold)
        if wish is None:
            admission = self.policy.admit(batch_size)
            speculates = admission is not Admission.PLAIN
            keeps = float(TRY_STEPS) if admission is Admission.TRIES else 0.0
        else:
            speculates, keeps = wish, math.inf if wish else 0.0
        ticket, turn = self._choose_trace(recv_req, labels) if self.capture else (0, 0)
        renews = self.cached_kv.renews(recv_req)
        traced = ticket != 0
        ticket = max(ticket, 0)
        put(recv_req, RequestPlan(speculates, keeps, traced, ticket, turn, renews, labels))

    def _choose_trace(self, recv_req: Any, labels: Labels) -> tuple[int, int]:
        """(ticket of its trace, 0 without one, -1 for one that goes on with its prompt's; key of
        its turn of a conversation) of a request."""
        if labels.warmup:
            return 0, 0
        prompt, session = recv_req.input_ids, getattr(recv_req, "session_id", None)
        turn = self.conversations.find(prompt, str(labels.conversation or session or ""))
        ticket = 0
        share = self.recorder.capture_share
        if labels.samples and self.prompts.claim(labels.samples, recv_req.rid):
            ticket = -1
        elif self.recorder.may_trace(labels) and self.conversations.wants_trace(turn, share):
            assert self.capture is not None
            most = recv_req.sampling_params.max_new_tokens
            if labels.prompt_of is not None:
                most = labels.prompt_of
            ticket = self.capture.choose(len(prompt) if prompt is not None else 0, most)
        if self.conversations.keep(turn, traced=ticket != 0) is not Place.PLAIN:
            recv_req.extra_key = f"{recv_req.extra_key or ''}{_TRACED}"
        return ticket, turn.key

    def observe_verify(self, batch: Any, result: Any) -> None:
        """After the verify forward: take references to what records need."""
        verify_input = batch.spec_info
        accept_index, self.accept_index = self.accept_index, None
        if accept_index is None or not batch.reqs:
            return
        nodes = int(verify_input.draft_token_num)
        size = len(batch.reqs)
        traced = [row for row, req in enumerate(batch.reqs) if _is_traced(req)]
        hidden = result.logits_output.hidden_states if traced else None
        last = None
        if traced and self.last_hidden:
            from_graph = bool(result.can_run_cuda_graph)
            last = self.last_hidden.take(size * nodes, from_graph=from_graph)
        blocks = [(row * nodes, nodes) for row in traced]
        on_cpu = hidden is None or hidden.device.type == "cpu"
        live = self.recorder.live
        predict, self.target_predict = self.target_predict, None
        result.aurora_verify = VerifyObservation(
            draft_token=to_host(verify_input.draft_token.reshape(size, nodes)),
            first_child=to_host(verify_input.retrieve_next_token),
            next_sibling=to_host(verify_input.retrieve_next_sibling),
            accept_index=to_host(accept_index),
            target_predict=to_host(predict.reshape(size, nodes)) if predict is not None else None,
            shape=self.step_shape.of_step(nodes),
            keeps_kv=self.step_shape.keeps_kv,
            grown=self.trees.take() if self.trees is not None else None,
            version_id=live.version_id,
            swap_count=live.swap_count,
            swap_age=live.steps_since_swap,
            rule=str(self.description.get("sampled_rule") or "target_sampling"),
            aux=rows_to_host(hidden, blocks) if hidden is not None else None,
            last=rows_to_host(last, blocks) if last is not None else None,
            blocks=None if on_cpu else {row: block for block, row in enumerate(traced)},
        )

    def before_decode_results(self, batch: Any) -> list[tuple[int, Any, RequestState, int]]:
        """Requests of the batch whose step counts, as SGLang itself counts it."""
        tracked = []
        for row, req in enumerate(batch.reqs):
            state = getattr(req, "_aurora", None)
            if state is not None and state.recorded and not req.finished() and not req.is_retracted:
                tracked.append((row, req, state, len(req.output_ids)))
        return tracked

    def after_decode_results(
        self, batch: Any, result: Any, tracked: list[tuple[int, Any, RequestState, int]]
    ) -> None:
        if not tracked:
            return
        observation: VerifyObservation | None = getattr(result, "aurora_verify", None)
        # The step was not observed, so that their records would have a hole.
        if observation is None:
            self.let_go(state for _, _, state, _ in tracked)
            return
        step = StepRows(observation, result.accept_lens.tolist(), len(batch.reqs))
        self._learn_lengths(observation, step, tracked)
        gathered = self._gather(observation.aux, observation.last)
        if self.capture is not None:
            self.capture.step_rows(gathered, tracked, step)
        records = [
            record
            for row, req, state, before in tracked
            for record in self._stepped(step, req, state, row, before, gathered)
        ]
        if self.capture is not None:
            self.capture.hand_over(gathered)
        if self.channel:
            self.channel.put(records)

    def _learn_lengths(
        self,
        observation: VerifyObservation,
        step: StepRows,
        tracked: list[tuple[int, Any, RequestState, int]],
    ) -> None:
        """What was accepted of requests whose draft KV is all of the live drafter."""
        grown = observation.grown
        if observation.shape == NO_DRAFT and grown is None:
            return
        accepted = {
            row: step.accept_lens[row] - 1
            for row, _, state, _ in tracked
            if not (state.holes or state.one_token) and state.swap_count == observation.swap_count
        }
        shape = observation.shape if grown is None else self.step_shape.whole
        self.policy.observe(observation.swap_count, shape, len(accepted), sum(accepted.values()))
        if grown is not None and self.trees is not None:
            nodes = observation.shape.nodes
            paths = {
                row: [index - row * nodes for index in step.paths[row][1 : count + 1]]
                for row, count in accepted.items()
            }
            self.trees.learn(grown, paths)

    def _gather(self, aux: torch.Tensor | None, last: torch.Tensor | None) -> Gathered:
        return self.capture.gather(aux, last) if self.capture is not None else Gathered(None)

    def _stepped(
        self,
        step: StepRows,
        req: Any,
        state: RequestState,
        row: int,
        before: int,
        gathered: Gathered,
    ) -> list[wire.Record]:
        """The records of one request of a step. If they fail, those of the others don't."""
        try:
            records = [self.recorder.verify_step(step, req, state, row, before)]
            if req.finished():
                records.append(self._finish(req, state, gathered))
        except Exception as error:
            self.parts.failed(_A_REQUEST, error)
            self.let_go([state])
            return []
        return records

    def after_prefill_results(self, batch: Any, result: Any) -> None:
        observed: Prefill | None = getattr(result, "aurora_prefill", None)
        pieces, aux, last = observed or ([], None, None)
        gathered = self._gather(aux, last)
        for req, state, start, offset, rows in pieces:
            if self.capture is not None and not req.is_retracted:
                self.capture.prompt_rows(gathered, req, state, start, offset, rows)
        through = [req for req in batch.reqs if req.inflight_middle_chunks <= 0]
        for req in through:
            if begun := getattr(req, "_aurora", None):
                self.cached_kv.met(req, begun)
        finished = [
            record for req in through if req.finished() for record in self._ended(req, gathered)
        ]
        if self.capture is not None:
            self.capture.hand_over(gathered)
        if finished and self.channel:
            self.channel.put(finished)

    def _ended(self, req: Any, gathered: Gathered) -> list[wire.Record]:
        """The last record of a request that ended at its first token."""
        state: RequestState | None = getattr(req, "_aurora", None)
        if state is not None and state.labels.prompt_of is not None:
            self.recorder.forget(state)
            self.prompts.done(state)
            req._aurora = None
            return []
        if state is None or not state.recorded:
            return []
        try:
            return [self._finish(req, state, gathered)]
        except Exception as error:
            self.parts.failed(_A_REQUEST, error)
            self.let_go([state])
            return []

    def _finish(self, req: Any, state: RequestState, gathered: Gathered) -> wire.Record:
        if state.traced and (state.trace is None or state.trace.broken):
            self.conversations.hold(state.turn)
        if self.capture is not None:
            self.capture.end(gathered, req, state)
        record = self.recorder.finish(req, state)
        req._aurora = None
        return record

    # -- the sidecar -------------------------------------------------------------------------

    def poll(self, recv_reqs: list[Any] | None) -> None:
        """Between two steps, on the leading rank: send what waits, take commands."""
        now = time.monotonic()
        if now - self._sidecar_heard >= ALONE_SECONDS and now - self._alone_at >= _DECIDE_SECONDS:
            self._alone_at = now
            self.policy.decide_alone()
        if self.channel is None:
            return
        if now - self._said_hello >= _HELLO_SECONDS:
            self._said_hello = now
            vanished = self.recorder.vanished()
            self._forget(vanished, "vanished")
            self._forget_prompts()
            self.channel.put([self.hello(), *vanished])
        while self._done:
            self.channel.put([self._done.pop(0)])
        self.channel.flush()
        command = self.channel.receive()
        if command is not None:
            self._obey(command)
        if command is not None or not self.channel.waiting_records:
            self._sidecar_heard = now  # what it does not take waits here
        if recv_reqs is not None:
            ours = self.swaps.next_command()
            if ours is not None:
                recv_reqs.append(ours)

    def _forget_prompts(self) -> None:
        for state in self.prompts.forget_old():
            self.conversations.hold(state.turn)
            self._forget([state], "vanished")

    def hello(self) -> wire.Hello:
        assert self.channel is not None
        self.parts.forget_old()
        if odd := self.channel.dropped_odd:
            self.notices["dropped: odd records"] = (
                f"{odd} records could not be encoded or sent and are missing in the store; the "
                "server's log has the first of them."
            )
        if unread := self.channel.unread_commands:
            self.notices["unread commands"] = (
                f"{unread} commands of the sidecar could not be read; are both of one release?"
            )
        self.consent.forget_old()
        counters = {
            "running_requests": float(self.recorder.running),
            "waiting_records": float(self.channel.waiting_records),
            "dropped_odd": float(self.channel.dropped_odd),
            "failures": float(self.parts.failures),
            "parts_down": float(self.parts.down),
            "unstamped": float(self.consent.unstamped),
            "unreadable_consent": float(self.consent.unreadable),
            "speculation_share": self.policy.share,
            "capture_share": self.recorder.capture_share,
            "queue": float(self.queue),
            **{name: float(self.description[name]) for name in ("depth", "topk", "nodes")},
            **self.policy.counters(),
            **(self.trees.counters() if self.trees is not None else {}),
            **(self.capture.counters() if self.capture is not None else {}),
        }
        return wire.Hello(
            boot_id=self.boot_id,
            pid=os.getpid(),
            server={
                name: clean.text(value, _LONGEST_PATH) if isinstance(value, str) else value
                for name, value in self.description.items()
            },
            live_version_id=self.recorder.live.version_id,
            swap_count=self.recorder.live.swap_count,
            dropped=self.channel.dropped_records,
            counters=counters,
            notices=dict(self.notices),
            trees=self.trees.memory() if self.trees is not None else {},
        )

    def _obey(self, command: wire.Command) -> None:
        if isinstance(command, wire.Identify):
            self.recorder.live.identified(command.version_id)
        elif isinstance(command, wire.SetPhase):
            if self.can_skip:
                self.policy.swapped(self.recorder.live.swap_count)
                self.policy.share = command.share
                self.policy.expected_accept_length = command.accept_length or None
        elif isinstance(command, wire.SetCapture):
            self.recorder.capture_share = command.share
        elif isinstance(command, wire.Trees):
            if self.trees is not None:
                self.trees.remember(command)
        elif isinstance(command, wire.LiveHash):
            self.swaps.hashed(command)
        else:
            self.swaps.ask(command)


def _recorder(
    settings: Settings, boot_id: int, description: dict[str, Any], *, captures: bool
) -> Recorder:
    return Recorder(
        boot_id,
        train_by_default=settings.train_by_default,
        keep_opted_out_tokens=settings.keep_opted_out_tokens,
        capture_share=settings.capture_share if captures else 0.0,
        dp_rank=int(description.get("dp_rank", 0)),
    )


def _grows(settings: Settings, whole: DraftShape) -> bool:
    """Whether each step's tree is chosen: a chain's drafter does not say how sure it is."""
    return settings.shapes == "learned" and not whole.is_chain


def _is_traced(req: Any) -> bool:
    state: RequestState | None = getattr(req, "_aurora", None)
    return state is not None and state.trace is not None and not state.trace.broken
