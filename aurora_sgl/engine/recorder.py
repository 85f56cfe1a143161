"""From a verify step to a record: what was proposed, what the target said, what was kept.

Records are built when the accept lengths have reached the CPU anyway, so that nothing here waits
for a device.
"""

from __future__ import annotations

import secrets
import weakref
from typing import Any

from aurora_sgl import wire
from aurora_sgl.client_text import MAX_LABEL
from aurora_sgl.draft_shape import NO_DRAFT
from aurora_sgl.engine import clean
from aurora_sgl.engine.draft_kv import LiveVersion
from aurora_sgl.engine.draft_tree import StepRows, parents_from_links
from aurora_sgl.engine.labels import Labels
from aurora_sgl.engine.plan import RequestPlan
from aurora_sgl.engine.request_state import (
    RequestState,
    describe_sampling,
    is_greedy,
    is_mixed,
    visible_length,
)
from aurora_sgl.hashing import sha256_ints


class Recorder:
    """Turns SGLang's batches into records. One per scheduler process."""

    def __init__(
        self,
        boot_id: int,
        *,
        train_by_default: bool,
        capture_share: float,
        dp_rank: int,
        keep_opted_out_tokens: bool = False,
    ) -> None:
        self.boot_id = boot_id
        self.live = LiveVersion()
        self.capture_share = capture_share
        self._train_by_default = train_by_default
        self._keep_opted_out_tokens = keep_opted_out_tokens
        self._dp_rank = dp_rank
        self._counter = 0
        self._running: dict[int, tuple[weakref.ref[Any], RequestState]] = {}

    @property
    def running(self) -> int:
        return len(self._running)

    def may_train(self, labels: Labels) -> bool:
        """Whether a request may be learnt from: its own word, else the server's setting."""
        return self._train_by_default if labels.may_train is None else labels.may_train

    def may_trace(self, labels: Labels) -> bool:
        """Whether the hidden states of a request may be captured."""
        return not labels.warmup and self.capture_share > 0 and self.may_train(labels)

    def begin(
        self, req: Any, plan: RequestPlan, *, follow: bool, prompt: RequestState | None = None
    ) -> RequestState | None:
        """Register a request at its first prefill; None for warm-ups and health checks.

        On every rank, and without a look at anything that a client can set but its labels: what
        the ranks do in a step follows from it. ``follow``: whether this rank records the request.
        ``prompt``: its prompt's own request, whose trace goes on as its (see ``samples``).
        """
        labels = plan.labels
        if labels.warmup or str(req.rid).startswith("HEALTH_CHECK"):
            req._aurora = None
            return None
        self._counter += 1
        state = RequestState(
            request_id=prompt.request_id
            if prompt is not None
            else wire.request_id(self.boot_id, self._counter),
            trace=prompt.trace if prompt is not None else None,
            traced=plan.traced,
            speculates=plan.speculates,
            greedy=is_greedy(req.sampling_params),
            swap_count=self.live.swap_count,
            keeps=plan.keeps,
            turn=plan.turn,
            whole=labels.whole,
            keeps_tokens=self._keep_opted_out_tokens or self.may_train(labels),
            labels=labels,
        )
        req._aurora = state
        if follow:
            self._running[state.request_id] = (weakref.ref(req), state)
        return state

    def started(self, req: Any, state: RequestState) -> wire.Record:
        """The first record of a request."""
        labels = state.labels
        conversation = labels.conversation or getattr(req, "session_id", None)
        prompt = list(req.origin_input_ids)
        return wire.RequestStarted(
            request_id=state.request_id,
            at_us=wire.now_us(),
            rid=clean.text(labels.rid or req.rid),
            dp_rank=self._dp_rank,
            domain=clean.text(labels.domain, MAX_LABEL),
            conversation_hash=sha256_ints(list(clean.text(conversation).encode()))
            if conversation
            else sha256_ints(prompt),
            prompt_tokens=len(prompt),
            cached_tokens=clean.integer(getattr(req, "cached_tokens", 0)),
            sampling=describe_sampling(req) | _without_drafts(state),
            may_train=self.may_train(labels),
            traced=state.traced,
            speculates=state.speculates,
        )

    def let_go(self, state: RequestState) -> wire.Record | None:
        """Record a request no further, since a part of us failed. It goes on being served, and is
        neither finished nor aborted as far as the store knows: its end is not known."""
        if not state.recorded:
            return None
        state.recorded = False
        return self._end(state, "lost", "not recorded to its end", 0, 0, 0)

    def verify_step(
        self, step: StepRows, req: Any, state: RequestState, row: int, before: int
    ) -> wire.Record:
        """The record of one request of a decode batch; ``before``: its output tokens until then.

        Of a request that may not be learnt from it has the counts, and no tokens.
        """
        observation = step.observation
        shape = NO_DRAFT if state.one_token else observation.shape
        accept_len = step.accept_lens[row]
        accepted = accept_len - 1
        path = [r - row * observation.shape.nodes for r in step.paths[row][1 : accepted + 1]]
        tip = path[-1] if path else 0
        has_children = step.first_child[row][tip] != -1
        drafted, parents, target = _tokens(step, req, row, before, shape.nodes)
        keeps = state.keeps_tokens
        state.holes |= observation.shape == NO_DRAFT and not observation.keeps_kv
        record = wire.VerifyStep(
            request_id=state.request_id,
            step=state.steps,
            at_us=step.at_us,
            version_id=observation.version_id,
            swap_age=observation.swap_age,
            mixed=is_mixed(state, observation),
            position=len(req.origin_input_ids) + before,
            depth=shape.depth,
            topk=shape.topk,
            nodes=shape.nodes,
            accept_rule="greedy" if state.greedy else observation.rule,
            batch_size=step.batch_size,
            proposed=shape.nodes - 1,
            accepted=accepted,
            kept=visible_length(req) - before,
            first_rejected_at=accepted + 1 if has_children else 0,
            draft_tokens=drafted if keeps else [],
            draft_parents=parents if keeps else [],
            accepted_nodes=path if keeps else [],
            target_tokens=target if keeps else [],
        )
        state.steps += 1
        state.proposed += shape.nodes - 1
        state.accepted += accepted
        return record

    def finish(self, req: Any, state: RequestState) -> wire.Record:
        """The last record of a request."""
        self._running.pop(state.request_id, None)
        reason = req.finished_reason
        kind = clean.text((reason.to_json() or {}).get("type", "")) if reason is not None else ""
        return self._end(
            state,
            "aborted" if kind == "abort" else "finished",
            kind,
            visible_length(req),
            clean.integer(getattr(req, "cached_tokens", 0)),
            clean.integer(getattr(req, "retraction_count", 0)),
        )

    def forget(self, state: RequestState) -> None:
        """A request that is not recorded is over."""
        self._running.pop(state.request_id, None)

    def vanished(self) -> list[wire.RequestFinished]:
        """Requests that SGLang forgot without finishing them, such as aborts in the queue."""
        gone = [state for ref, state in self._running.values() if ref() is None]
        for state in gone:
            del self._running[state.request_id]
        return [self._end(state, "aborted", "abort", 0, 0, 0) for state in gone if state.recorded]

    def _end(
        self, state: RequestState, status: str, reason: str, *counts: int
    ) -> wire.RequestFinished:
        """``counts``: tokens of the answer, cached tokens, retractions."""
        completion_tokens, cached_tokens, retractions = counts
        return wire.RequestFinished(
            request_id=state.request_id,
            at_us=wire.now_us(),
            status=status,
            finish_reason=reason,
            completion_tokens=completion_tokens,
            cached_tokens=cached_tokens,
            verify_steps=state.steps,
            proposed=state.proposed,
            accepted=state.accepted,
            retractions=retractions,
        )


def _without_drafts(state: RequestState) -> dict[str, str]:
    return {wire.WITHOUT_DRAFTS: ", ".join(state.no_drafts)} if state.no_drafts else {}


def _tokens(
    step: StepRows, req: Any, row: int, before: int, nodes: int
) -> tuple[list[int], list[int], list[int]]:
    """(tokens of the proposals, their parents, the target's tokens) of one request of a step."""
    parents = parents_from_links(step.first_child[row], step.next_sibling[row])
    drafted = step.draft_token[row][1:nodes], parents[: nodes - 1]
    if step.target_predict is not None:
        return *drafted, step.target_predict[row][:nodes]
    # Sampled: the tokens along the accepted path; a stop may have cut the output, but SGLang keeps
    # the whole run in output_ids.
    return *drafted, list(req.output_ids[before : before + step.accept_lens[row]])


def new_boot_id() -> int:
    """31 random bits, not zero: differs between any two starts."""
    return secrets.randbelow((1 << 31) - 1) + 1
