"""From a verify step to a record: what was proposed, what the target said, what was kept.

:func:`observe_verify` runs right after the verify forward and only takes references (on a GPU it
starts copies into pinned memory); :class:`Recorder` builds the records when the accept lengths have
reached the CPU anyway, so that nothing here waits for a device.
"""

from __future__ import annotations

import secrets
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from aurora_sgl import wire
from aurora_sgl.engine import labels
from aurora_sgl.hashing import sha256_ints


@dataclass(slots=True)
class Live:
    """What the drafter is at this moment, as far as records need it."""

    version_id: int = 0
    swap_count: int = 0
    steps_since_swap: int = 0


@dataclass(slots=True)
class RequestState:
    """One request, from its first prefill to its end. Hangs on SGLang's ``Req``."""

    request_id: int
    traced: bool
    speculates: bool
    greedy: bool
    swap_count: int  # of the server when the request was first prefilled
    keeps: float = 0.0  # steps for which it keeps its drafts even where they lose
    whole: bool = False  # its steps carry the whole draft shape, whatever pays
    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    holes: bool = False  # a plain step left holes in the draft KV
    trace_rows: list[tuple[int, list[int], torch.Tensor, torch.Tensor | None]] = field(
        default_factory=list
    )
    step_starts: list[int] = field(default_factory=list)
    trace_pending: int = 0
    trace_broken: bool = False


@dataclass(slots=True)
class VerifyObservation:
    """What one verify step leaves behind: CPU tensors, or pinned copies on their way."""

    draft_token: torch.Tensor  # [batch, nodes]
    first_child: torch.Tensor  # [batch, nodes]
    next_sibling: torch.Tensor  # [batch, nodes]
    accept_index: torch.Tensor  # [batch, depth + 1] rows of the flattened batch, -1 padded
    target_predict: torch.Tensor | None  # [batch, nodes]; None when the batch was sampled
    depth: int
    topk: int
    nodes: int
    version_id: int
    swap_count: int
    swap_age: int
    rejection_sampling: bool
    aux: torch.Tensor | None = None  # [batch * nodes, width], accepted path in front
    last: torch.Tensor | None = None  # [batch * nodes, hidden], node order


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself on CPU; on a GPU a pinned copy that is filled asynchronously. It is
    complete once the step's own copies are, which SGLang waits for before it reads results."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def parents_from_links(first_child: list[int], next_sibling: list[int]) -> list[int]:
    """Parent node of node 1..nodes-1 of one request; -1 for a node that hangs on nothing."""
    parents = [-1] * len(first_child)
    for parent, child in enumerate(first_child):
        while child != -1:
            parents[child] = parent
            child = next_sibling[child]
    return parents[1:]


def visible_length(req: Any) -> int:
    """Output tokens that the client gets: SGLang keeps what lies past a stop in ``output_ids``."""
    return int(req.finished_len) if req.finished_len is not None else len(req.output_ids)


def describe_sampling(req: Any) -> dict[str, Any]:
    """The sampling parameters that matter for learning and replay."""
    params = req.sampling_params
    described: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "max_new_tokens": params.max_new_tokens,
    }
    for name in ("frequency_penalty", "presence_penalty"):
        if value := getattr(params, name, 0.0):
            described[name] = value
    if getattr(params, "repetition_penalty", 1.0) != 1.0:
        described["repetition_penalty"] = params.repetition_penalty
    if getattr(params, "min_new_tokens", 0):
        described["min_new_tokens"] = params.min_new_tokens
    if getattr(params, "logit_bias", None):
        described["logit_bias"] = True
    if any(
        getattr(params, name, None) for name in ("json_schema", "regex", "ebnf", "structural_tag")
    ):
        described["grammar"] = True
    if getattr(req, "custom_logit_processor", None):
        described["custom_logit_processor"] = True
    return described


def is_greedy(params: Any) -> bool:
    """SGLang turns temperature 0 into top-k 1."""
    return bool(params.top_k == 1 or params.temperature == 0.0)


class Recorder:
    """Turns SGLang's batches into records. One per scheduler process."""

    def __init__(
        self, boot_id: int, *, train_by_default: bool, capture_share: float, dp_rank: int
    ) -> None:
        self.boot_id = boot_id
        self.live = Live()
        self.capture_share = capture_share
        self._train_by_default = train_by_default
        self._dp_rank = dp_rank
        self._counter = 0
        self._capture_credit = 0.0
        self._running: dict[int, tuple[weakref.ref[Any], RequestState]] = {}

    @property
    def running(self) -> int:
        return len(self._running)

    def may_train(self, said: labels.Labels) -> bool:
        """Whether a request may be learnt from: its own word, else the server's setting."""
        return self._train_by_default if said.may_train is None else said.may_train

    def choose_to_trace(self, said: labels.Labels) -> bool:
        """Whether the hidden states of a request that comes in now are captured."""
        if said.warmup or not self.may_train(said):
            return False
        self._capture_credit = min(self._capture_credit + self.capture_share, 1.0)
        if self.capture_share <= 0 or self._capture_credit < 1.0:
            return False
        self._capture_credit -= 1.0
        return True

    def admit(
        self, req: Any, *, speculates: bool, traced: bool, follow: bool, keeps: float = 0.0
    ) -> tuple[RequestState, wire.Record] | None:
        """Register a request at its first prefill; None for warm-ups and health checks.

        ``follow``: whether this rank records it to its end; ``keeps``: see ``RequestState``.
        """
        said = labels.read(req.sampling_params)
        if said.warmup or str(req.rid).startswith("HEALTH_CHECK"):
            req._aurora = None
            return None
        self._counter += 1
        may_train = self.may_train(said)
        state = RequestState(
            request_id=wire.request_id(self.boot_id, self._counter),
            traced=traced,
            speculates=speculates,
            greedy=is_greedy(req.sampling_params),
            swap_count=self.live.swap_count,
            keeps=keeps,
            whole=said.whole,
        )
        req._aurora = state
        if follow:
            self._running[state.request_id] = (weakref.ref(req), state)
        conversation = said.conversation or getattr(req, "session_id", None)
        prompt = list(req.origin_input_ids)
        started = wire.RequestStarted(
            request_id=state.request_id,
            at_us=wire.now_us(),
            rid=str(req.rid)[:128],
            dp_rank=self._dp_rank,
            domain=said.domain,
            conversation_hash=sha256_ints(list(str(conversation).encode()))
            if conversation
            else sha256_ints(prompt),
            prompt_tokens=len(prompt),
            cached_tokens=int(getattr(req, "cached_tokens", 0) or 0),
            sampling=describe_sampling(req),
            may_train=may_train,
            traced=traced,
            speculates=speculates,
        )
        return state, started

    def verify_steps(
        self,
        batch: Any,
        observation: VerifyObservation,
        accept_lens: list[int],
        tracked: list[tuple[int, Any, RequestState, int]],
    ) -> list[wire.Record]:
        """One record per request of a decode batch.

        ``tracked`` holds (row in the batch, request, state, output tokens before the step).
        """
        seen = observation
        drafted = seen.draft_token.tolist()
        first, sibling = seen.first_child.tolist(), seen.next_sibling.tolist()
        path_rows = seen.accept_index.tolist()
        wanted = seen.target_predict.tolist() if seen.target_predict is not None else None
        at_us, size = wire.now_us(), len(batch.reqs)
        records: list[wire.Record] = []
        for row, req, state, before in tracked:
            accepted = accept_lens[row] - 1
            path = [r - row * seen.nodes for r in path_rows[row][1 : accepted + 1]]
            parents = parents_from_links(first[row], sibling[row])
            tip = path[-1] if path else 0
            has_children = first[row][tip] != -1
            if wanted is not None:
                target_tokens = wanted[row]
            else:
                # Sampled: the tokens along the accepted path; a stop may have cut the output, but
                # SGLang keeps the whole run in output_ids.
                target_tokens = list(req.output_ids[before : before + accept_lens[row]])
            state.holes |= seen.depth == 0
            records.append(
                wire.VerifyStep(
                    request_id=state.request_id,
                    step=state.steps,
                    at_us=at_us,
                    version_id=seen.version_id,
                    swap_age=seen.swap_age,
                    mixed=state.swap_count != seen.swap_count or (state.holes and seen.depth > 0),
                    position=len(req.origin_input_ids) + before,
                    depth=seen.depth,
                    topk=seen.topk,
                    nodes=seen.nodes,
                    accept_rule="greedy"
                    if state.greedy
                    else ("rejection_sampling" if seen.rejection_sampling else "target_sampling"),
                    batch_size=size,
                    proposed=seen.nodes - 1,
                    accepted=accepted,
                    kept=visible_length(req) - before,
                    first_rejected_at=accepted + 1 if has_children else 0,
                    draft_tokens=drafted[row][1:],
                    draft_parents=parents,
                    accepted_nodes=path,
                    target_tokens=target_tokens,
                )
            )
            state.steps += 1
            state.proposed += seen.nodes - 1
            state.accepted += accepted
        return records

    def finish(self, req: Any, state: RequestState) -> wire.Record:
        """The last record of a request."""
        self._running.pop(state.request_id, None)
        reason = req.finished_reason
        kind = str((reason.to_json() or {}).get("type", "")) if reason is not None else ""
        return wire.RequestFinished(
            request_id=state.request_id,
            at_us=wire.now_us(),
            status="aborted" if kind == "abort" else "finished",
            finish_reason=kind,
            completion_tokens=visible_length(req),
            cached_tokens=int(getattr(req, "cached_tokens", 0) or 0),
            verify_steps=state.steps,
            proposed=state.proposed,
            accepted=state.accepted,
            retractions=int(getattr(req, "retraction_count", 0)),
        )

    def vanished(self) -> list[wire.Record]:
        """Requests that SGLang forgot without finishing them, such as aborts in the queue."""
        gone = [state for ref, state in self._running.values() if ref() is None]
        records: list[wire.Record] = []
        for state in gone:
            del self._running[state.request_id]
            records.append(
                wire.RequestFinished(
                    request_id=state.request_id,
                    at_us=wire.now_us(),
                    status="aborted",
                    finish_reason="abort",
                    completion_tokens=0,
                    cached_tokens=0,
                    verify_steps=state.steps,
                    proposed=state.proposed,
                    accepted=state.accepted,
                    retractions=0,
                )
            )
        return records


def new_boot_id() -> int:
    """31 random bits, not zero: differs between any two starts."""
    return secrets.randbelow((1 << 31) - 1) + 1
