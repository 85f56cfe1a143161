"""What the engine plugin and the sidecar say to each other.

The plugin (inside SGLang's scheduler process) sends :class:`Record` messages; the sidecar sends
:class:`Command` messages back. Both are msgpack arrays (msgspec), so that a record costs
microseconds and a hundred bytes. Nothing here imports sglang or torch.

One message on the record channel is one :class:`Envelope`: records that belong to one scheduler
step. Envelopes of one boot are numbered from 1 without gaps, so that a reader knows exactly what
was lost between the two processes.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

WIRE_VERSION = 1
#: Beside the sampling parameters of a request: those for which it was served without drafts.
WITHOUT_DRAFTS = "without_drafts"

#: Bits of a request id that count requests of one boot; the boot id stands above them.
REQUEST_COUNTER_BITS = 32


def now_us() -> int:
    """Wall-clock time in microseconds since the epoch (UTC)."""
    return time.time_ns() // 1000


def request_id(boot_id: int, counter: int) -> int:
    """The store's key of a request: 31 bits of boot id above 32 bits of counter."""
    assert 0 < boot_id < 1 << 31, boot_id
    assert 0 < counter < 1 << REQUEST_COUNTER_BITS, counter
    return boot_id << REQUEST_COUNTER_BITS | counter


class Hello(msgspec.Struct, array_like=True, tag="hello", frozen=True):
    """Who is speaking. Sent at start and every few seconds, so that a new sidecar learns it too."""

    boot_id: int
    pid: int
    server: dict[str, Any]  # see engine.describe.describe_worker: name, target_model, dtype, ...
    live_version_id: int  # 0: the drafter that the server was started with
    swap_count: int
    dropped: int  # records dropped since boot because the buffer was full
    counters: dict[str, float]  # phase, step times, queue length and the like
    notices: dict[str, str] = {}  # code -> a sentence about what is wrong or off in this server
    trees: dict[str, Any] = {}  # now and then, what it learnt of its trees (see engine.tree_choice)


class RequestStarted(msgspec.Struct, array_like=True, tag="start", frozen=True):
    """One admitted request. Sent before its first verify step."""

    request_id: int
    at_us: int
    rid: str
    dp_rank: int
    domain: str
    conversation_hash: str  # hex; "" when the request names no conversation
    prompt_tokens: int
    cached_tokens: int
    sampling: dict[str, Any]
    may_train: bool
    traced: bool
    speculates: bool  # False while it is served without drafts (see the phase of the server)


class VerifyStep(msgspec.Struct, array_like=True, tag="step", frozen=True):
    """One verify step of one request: one row of ``acceptance_event``.

    Nodes are numbered as in SGLang's draft tree: node 0 is the previous bonus token (already
    accepted, not a proposal), nodes 1..nodes-1 are proposals in breadth order.
    """

    request_id: int
    step: int  # 0-based within the request
    at_us: int
    version_id: int  # 0: the drafter that the server was started with
    swap_age: int  # verify steps of the server since the last swap
    mixed: bool  # draft KV (a cached prefix's too) is not all of the live version, or has holes
    position: int  # tokens of the sequence (prompt and output) before this step's first new token
    depth: int  # 0: a plain step without proposals
    topk: int
    nodes: int  # tree nodes with the root: 1 for a plain step
    accept_rule: str  # greedy | target_sampling | rejection_sampling | block_verification
    batch_size: int
    proposed: int  # proposals: nodes - 1
    accepted: int  # proposals that the target accepted
    kept: int  # tokens that the output kept of this step (accepted + bonus, less a cut)
    first_rejected_at: int  # depth (1-based) of the first rejected proposal; 0: none rejected
    draft_tokens: list[int]  # token of node 1..nodes-1
    draft_parents: list[int]  # parent node of node 1..nodes-1
    accepted_nodes: list[int]  # node numbers along the accepted path, without the root
    target_tokens: list[int]  # greedy: target's token after each node 0..nodes-1;
    #                           sampled: along the accepted path, the last one is the bonus


class RequestFinished(msgspec.Struct, array_like=True, tag="finish", frozen=True):
    """The end of a request, with SGLang's own counters beside ours."""

    request_id: int
    at_us: int
    status: str  # finished | aborted
    finish_reason: str
    completion_tokens: int
    cached_tokens: int
    verify_steps: int
    proposed: int
    accepted: int
    retractions: int


class SwapDone(msgspec.Struct, array_like=True, tag="swap", frozen=True):
    """The answer to a :class:`Stage` command: applied, or refused with a reason."""

    boot_id: int
    at_us: int  # when it went live, or was refused
    version_id: int
    ok: bool
    reason: str
    live_sha256: str  # hash of the tensors read back from the model; "" when refused
    staged_ms: float
    apply_ms: float  # time that the scheduler loop stood still for the copy


class LiveCopied(msgspec.Struct, array_like=True, tag="copied", frozen=True):
    """The file of a :class:`Stage` now holds the tensors of the model, read back after the swap.
    The sidecar hashes them and tells it by :class:`LiveHash`; then comes :class:`SwapDone`."""

    boot_id: int
    at_us: int
    version_id: int


Record = Hello | RequestStarted | VerifyStep | RequestFinished | SwapDone | LiveCopied


class Envelope(msgspec.Struct, array_like=True, frozen=True):
    """Records of one scheduler step. ``seq`` counts the envelopes of a boot from 1."""

    boot_id: int
    seq: int
    records: list[Record]
    before: int = 0  # records of the boot in all envelopes before this one


class TraceHeader(msgspec.Struct, array_like=True, frozen=True):
    """Rows of one request: in a :class:`TraceBatch`, or frame 0 of a message of three frames, of
    which frame 1 is ``aux`` and frame 2 ``last``, raw bytes.

    Rows are the target's features of the absolute positions ``start .. start + rows - 1`` of one
    sequence; ``tokens`` are the input tokens at those positions. A retracted request sends some
    positions again: the later one wins.
    """

    boot_id: int
    request_id: int
    start: int
    tokens: list[int]
    dtype: str  # bfloat16 | float16 | float32
    aux_width: int  # 3 * hidden for EAGLE3, hidden for EAGLE
    last_width: int  # hidden size of the target's normed last hidden state; 0: not captured
    final: bool  # no more rows follow for this request
    output_start: int  # position of the first output token (= prompt length)
    greedy: bool
    step_starts: list[int]  # positions of the root of the verify steps in this chunk (see replay)
    aux_at: int = 0  # positions in the ring of a TraceBatch, and bytes there
    aux_bytes: int = 0
    last_at: int = 0
    last_bytes: int = 0


class TraceBatch(msgspec.Struct, array_like=True, frozen=True):
    """A message of one frame on the trace channel: its rows lie in shared memory.

    See ``trace_ring``. Without headers it only says how far the reader may free.
    """

    boot_id: int
    ring: str  # the path by which the reader opens it
    end: int  # the ring is free up to this position once the batch was taken
    headers: list[TraceHeader]
    given_up: list[int] = []  # requests of which nothing follows and nothing is kept


class Stage(msgspec.Struct, array_like=True, tag="stage", frozen=True):
    """Put a version live: the weights lie in ``path``, already validated. The file is the engine's
    now, which cuts it as it reads and writes into it what it reads back."""

    version_id: int
    path: str  # a safetensors file under /dev/shm
    weights_sha256: str
    deadline_us: int


class LiveHash(msgspec.Struct, array_like=True, tag="hash", frozen=True):
    """What the tensors of a :class:`LiveCopied` hash to."""

    version_id: int
    live_sha256: str  # "": they could not be hashed


class Identify(msgspec.Struct, array_like=True, tag="identify", frozen=True):
    """Tells the plugin which stored version the drafter is that it was started with."""

    version_id: int


class SetPhase(msgspec.Struct, array_like=True, tag="phase", frozen=True):
    """How much to speculate: the share of verify steps in [0, 1] that may carry drafts."""

    share: float
    reason: str
    accept_length: float = 0.0  # expected of the live version; 0: not known


class Trees(msgspec.Struct, array_like=True, tag="trees", frozen=True):
    """What an earlier boot of this server learnt of its trees."""

    state: dict[str, Any]
    same_drafter: bool  # as is live now


class SetCapture(msgspec.Struct, array_like=True, tag="capture", frozen=True):
    """Share of requests whose hidden states are captured, in [0, 1]."""

    share: float


Command = Stage | LiveHash | Identify | SetPhase | SetCapture | Trees

_envelope_encoder = msgspec.msgpack.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)
_command_decoder = msgspec.msgpack.Decoder(Command)
_trace_decoder = msgspec.msgpack.Decoder(TraceHeader)
_batch_decoder = msgspec.msgpack.Decoder(TraceBatch)


def encode(message: Envelope | TraceHeader | TraceBatch | Command) -> bytes:
    return _envelope_encoder.encode(message)


def decode_envelope(data: bytes) -> Envelope:
    """Raises ``msgspec.DecodeError`` for bytes that are not an envelope."""
    return _envelope_decoder.decode(data)


def decode_command(data: bytes) -> Command:
    """Raises ``msgspec.DecodeError`` for bytes that are not a command."""
    command: Command = _command_decoder.decode(data)
    return command


def decode_trace_header(data: bytes) -> TraceHeader:
    """Raises ``msgspec.DecodeError`` for bytes that are not a trace header."""
    return _trace_decoder.decode(data)


def decode_trace_batch(data: bytes) -> TraceBatch:
    """Raises ``msgspec.DecodeError`` for bytes that are not a trace batch."""
    return _batch_decoder.decode(data)
