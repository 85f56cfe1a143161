"""From a verify step to a record: what was proposed, what the target said, what was kept.

Records are built when the accept lengths have reached the CPU anyway, so that nothing here waits
for a device.
"""

from __future__ import annotations

import secrets
import weakref
from typing import Any

from aurora_sgl import wire
from aurora_sgl.draft_shape import NO_DRAFT
from aurora_sgl.engine import clean
from aurora_sgl.engine.draft_kv import LiveVersion
from aurora_sgl.engine.draft_tree import StepRows, parents_from_links
from aurora_sgl.engine.labels import MAX_LABEL, Labels
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
        self, boot_id: int, *, train_by_default: bool, capture_share: float, dp_rank: int
    ) -> None:
        self.boot_id = boot_id
        self.live = LiveVersion()
        self.capture_share = capture_share
        self._train_by_default = train_by_default
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

    def begin(self, req: Any, plan: RequestPlan, *, follow: bool) -> RequestState | None:
        """Register a request at its first prefill; None for warm-ups and health checks.

        On every rank, and without a look at anything that a client can set but its labels: what
        the ranks do in a step follows from it. ``follow``: whether this rank records the request.
        """
        labels = plan.labels
        if labels.warmup or str(req.rid).startswith("HEALTH_CHECK"):
            req._aurora = None
            return None
        self._counter += 1
        state = RequestState(
            request_id=wire.request_id(self.boot_id, self._counter),
            traced=plan.traced,
            speculates=plan.speculates,
            greedy=is_greedy(req.sampling_params),
            swap_count=self.live.swap_count,
            keeps=plan.keeps,
            turn=plan.turn,
            whole=labels.whole,
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
            rid=clean.text(req.rid),
            dp_rank=self._dp_rank,
            domain=clean.text(labels.domain, MAX_LABEL),
            conversation_hash=sha256_ints(list(clean.text(conversation).encode()))
            if conversation
            else sha256_ints(prompt),
            prompt_tokens=len(prompt),
            cached_tokens=clean.integer(getattr(req, "cached_tokens", 0)),
            sampling=describe_sampling(req),
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
        """The record of one request of a decode batch; ``before``: its output tokens until then."""
        observation = step.observation
        accept_len = step.accept_lens[row]
        accepted = accept_len - 1
        path = [r - row * observation.shape.nodes for r in step.paths[row][1 : accepted + 1]]
        tip = path[-1] if path else 0
        has_children = step.first_child[row][tip] != -1
        if step.target_predict is not None:
            target_tokens = step.target_predict[row]
        else:
            # Sampled: the tokens along the accepted path; a stop may have cut the output, but
            # SGLang keeps the whole run in output_ids.
            target_tokens = list(req.output_ids[before : before + accept_len])
        state.holes |= observation.shape == NO_DRAFT and not observation.keeps_kv
        record = wire.VerifyStep(
            request_id=state.request_id,
            step=state.steps,
            at_us=step.at_us,
            version_id=observation.version_id,
            swap_age=observation.swap_age,
            mixed=is_mixed(state, observation),
            position=len(req.origin_input_ids) + before,
            depth=observation.shape.depth,
            topk=observation.shape.topk,
            nodes=observation.shape.nodes,
            accept_rule="greedy"
            if state.greedy
            else ("rejection_sampling" if observation.rejection_sampling else "target_sampling"),
            batch_size=step.batch_size,
            proposed=observation.shape.nodes - 1,
            accepted=accepted,
            kept=visible_length(req) - before,
            first_rejected_at=accepted + 1 if has_children else 0,
            draft_tokens=step.draft_token[row][1:],
            draft_parents=parents_from_links(step.first_child[row], step.next_sibling[row]),
            accepted_nodes=path,
            target_tokens=target_tokens,
        )
        state.steps += 1
        state.proposed += observation.shape.nodes - 1
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


def new_boot_id() -> int:
    """31 random bits, not zero: differs between any two starts."""
    return secrets.randbelow((1 << 31) - 1) + 1
