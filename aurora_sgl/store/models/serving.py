"""What was served: groups, servers, requests, verify steps, roll-ups and traces.

The hot tables (``acceptance_event``, ``acceptance_minute``, ``acceptance_hour``,
``request_tally``) carry no foreign keys: each row would pay for the look-up, and ingest writes them
together with their request.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, Integer, LargeBinary, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from aurora_sgl.store.models.base import Base

#: Half the width of the default: the hot table has eleven of them a row.
Int32 = Annotated[int, mapped_column(Integer)]


class DeploymentGroup(Base):
    """The servers that share a target, its revision and a draft shape."""

    __tablename__ = "deployment_group"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    target_model: Mapped[str]
    target_revision: Mapped[str] = mapped_column(default="")
    draft_architecture: Mapped[str]
    generation: Mapped[int] = mapped_column(default=0)  # deployments so far
    created_at: Mapped[datetime]


class Server(Base):
    """One boot of one SGLang."""

    __tablename__ = "server"
    __table_args__ = (
        CheckConstraint("state IN ('running', 'stopped', 'gone')", name="state"),
        Index(None, "group_id", "state"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    name: Mapped[str]
    boot_id: Mapped[int] = mapped_column(unique=True)
    sglang_version: Mapped[str] = mapped_column(default="")
    boot_version_id: Mapped[int | None] = mapped_column(ForeignKey("drafter_version.id"))
    live_version_id: Mapped[int | None] = mapped_column(ForeignKey("drafter_version.id"))
    live_sha256: Mapped[str] = mapped_column(default="")  # of tensors read back from the model
    state: Mapped[str] = mapped_column(default="running")
    dtype: Mapped[str] = mapped_column(default="")
    phase: Mapped[str] = mapped_column(default="")
    phase_reason: Mapped[str] = mapped_column(default="")
    speculation_share: Mapped[float | None]  # of the verify steps, in [0, 1]
    counters: Mapped[dict[str, Any]] = mapped_column(default=dict)
    notices: Mapped[dict[str, Any]] = mapped_column(default=dict)  # code -> a sentence for people
    last_error: Mapped[str] = mapped_column(default="")
    started_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]


class Swap(Base):
    """One swap that a server made, or refused with a reason: how long its scheduler stood still,
    and how long the stream that waited longest had to wait."""

    __tablename__ = "swap"

    server_id: Mapped[int] = mapped_column(
        ForeignKey("server.id"), primary_key=True, autoincrement=False
    )
    at: Mapped[datetime] = mapped_column(primary_key=True)
    version_id: Mapped[int]  # may be one of another store
    ok: Mapped[bool]
    reason: Mapped[str] = mapped_column(default="")
    live_sha256: Mapped[str] = mapped_column(default="")  # read back from the model
    staged_ms: Mapped[float]
    apply_ms: Mapped[float]
    longest_stall_ms: Mapped[float | None]  # between two steps of a request; None: nobody waited


class Request(Base):
    """One admitted request. ``id`` is ``wire.request_id``; ``rid`` is only text.

    ``verify_steps``, ``proposed`` and ``accepted`` are counted from stored events;
    ``reported_*`` are SGLang's own counters at the end of the request.
    """

    __tablename__ = "request"
    __table_args__ = (
        CheckConstraint("status IN ('running', 'finished', 'aborted', 'lost')", name="status"),
        Index(None, "server_id", "status"),
        Index(None, "finished_at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    rid: Mapped[str] = mapped_column(default="")
    server_id: Mapped[int] = mapped_column(ForeignKey("server.id"))
    dp_rank: Mapped[int] = mapped_column(default=0)
    admitted_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    status: Mapped[str] = mapped_column(default="running")
    domain: Mapped[str] = mapped_column(default="default")
    #: Salted (``store.salt``): of the client's name, else of the prompt; with ":" in it: derived
    #: from the tokens, see ``sidecar.traces.turns``.
    conversation_hash: Mapped[str] = mapped_column(default="")
    prompt_tokens: Mapped[int] = mapped_column(default=0)
    cached_tokens: Mapped[int] = mapped_column(default=0)
    completion_tokens: Mapped[int] = mapped_column(default=0)
    verify_steps: Mapped[int] = mapped_column(default=0)
    proposed: Mapped[int] = mapped_column(default=0)
    accepted: Mapped[int] = mapped_column(default=0)
    reported_verify_steps: Mapped[int | None]
    reported_proposed: Mapped[int | None]
    reported_accepted: Mapped[int | None]
    retractions: Mapped[int] = mapped_column(default=0)
    sampling: Mapped[dict[str, Any]] = mapped_column(default=dict)
    finish_reason: Mapped[str] = mapped_column(default="")
    may_train: Mapped[bool] = mapped_column(default=False)
    traced: Mapped[bool] = mapped_column(default=False)
    speculates: Mapped[bool] = mapped_column(default=True)
    accept_rule: Mapped[str] = mapped_column(default="")  # of its verify steps; "": it had none


class AcceptanceEvent(Base):
    """One verify step of one request. ``at`` is fixed when the step is recorded.

    SQLite: key (request_id, step), WITHOUT ROWID, index on ``at``. PostgreSQL: partitioned by day
    on ``at``, which therefore belongs to the key there.
    """

    __tablename__ = "acceptance_event"
    __table_args__ = (
        Index(None, "at").ddl_if(dialect="sqlite"),
        Index("ix_acceptance_event_at_brin", "at", postgresql_using="brin").ddl_if(
            dialect="postgresql"
        ),
        {"sqlite_with_rowid": False, "postgresql_partition_by": "RANGE (at)"},
    )

    request_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    step: Mapped[Int32] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    drafter_version_id: Mapped[int]  # 0: a drafter that is not in the store
    swap_age: Mapped[Int32]  # verify steps of the server since its last swap
    mixed: Mapped[bool]  # draft KV of more than one version, or with holes
    position: Mapped[Int32]
    depth: Mapped[Int32]  # 0: a plain step, without proposals
    topk: Mapped[Int32]
    nodes: Mapped[Int32]  # with the root
    accept_rule: Mapped[str]
    batch_size: Mapped[Int32]
    proposed: Mapped[Int32]
    accepted: Mapped[Int32]
    kept: Mapped[Int32]
    first_rejected_at: Mapped[Int32]  # depth, from 1; 0: none was rejected
    draft_tokens: Mapped[bytes] = mapped_column(LargeBinary)  # int32 [nodes - 1]
    draft_parents: Mapped[bytes] = mapped_column(LargeBinary)  # int32 [nodes - 1]
    accepted_nodes: Mapped[bytes] = mapped_column(LargeBinary)  # int32 [accepted]
    target_tokens: Mapped[bytes] = mapped_column(LargeBinary)  # int32 [nodes] or [accepted + 1]
    draft_logprobs: Mapped[bytes | None] = mapped_column(LargeBinary)  # float16 [nodes - 1]


class AcceptanceMinute(Base):
    """Verify steps of one minute that agree in all key columns, summed.

    ``histogram[i]`` counts steps with i accepted; ``per_position[i]`` counts steps that accepted
    a proposal at depth i + 1. ``requests`` counts requests whose first step under this version,
    draft shape and ``mixed`` fell here, so that sums over minutes count each request once.

    With n steps and y accepted of one request under one (version, depth, topk, nodes, mixed),
    ``sum_steps_squared`` = sum n^2, ``sum_accepted_squared`` = sum y^2,
    ``sum_steps_accepted`` = sum n y over requests. A row holds the growth of those sums by its
    own steps, so sums over rows that cover whole requests are exact.

    The four are right for rows of one draft shape. For sums over several there are the same four
    with n and y under one (version, mixed), ``version_...``, and under one version, ``any_...``;
    0 in rows without drafts.
    """

    __tablename__ = "acceptance_minute"
    __table_args__ = (Index(None, "drafter_version_id", "bucket_start"),)

    bucket_start: Mapped[datetime] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    drafter_version_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    domain: Mapped[str] = mapped_column(primary_key=True)
    depth: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    topk: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    #: With the root; 0: not known, in rows from before schema 0008 (see there what is).
    nodes: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    accept_rule: Mapped[str] = mapped_column(primary_key=True)
    batch_bucket: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    mixed: Mapped[bool] = mapped_column(primary_key=True)
    verify_steps: Mapped[int]
    proposed: Mapped[int]
    accepted: Mapped[int]
    requests: Mapped[int]
    completion_tokens: Mapped[int]  # kept tokens of these steps
    sum_steps_squared: Mapped[int]
    sum_accepted_squared: Mapped[int]
    sum_steps_accepted: Mapped[int]
    version_requests: Mapped[int]
    version_sum_steps_squared: Mapped[int]
    version_sum_accepted_squared: Mapped[int]
    version_sum_steps_accepted: Mapped[int]
    any_requests: Mapped[int]
    any_sum_steps_squared: Mapped[int]
    any_sum_accepted_squared: Mapped[int]
    any_sum_steps_accepted: Mapped[int]
    histogram: Mapped[list[int]]
    per_position: Mapped[list[int]]


class AcceptanceHour(Base):
    """The sums of ``acceptance_minute`` by the hour, whatever the batch sizes. Triggers of that
    table keep them; nobody else writes here.

    ``minutes`` counts the rows that are in it, ``first_minute`` and ``last_minute`` are the ends of
    what ever was. The other columns mean what they mean there.
    """

    __tablename__ = "acceptance_hour"
    __table_args__ = ({"sqlite_with_rowid": False},)

    hour: Mapped[datetime] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    drafter_version_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    domain: Mapped[str] = mapped_column(primary_key=True)
    depth: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    topk: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    nodes: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    accept_rule: Mapped[str] = mapped_column(primary_key=True)
    mixed: Mapped[bool] = mapped_column(primary_key=True)
    minutes: Mapped[int]
    first_minute: Mapped[datetime]
    last_minute: Mapped[datetime]
    verify_steps: Mapped[int]
    proposed: Mapped[int]
    accepted: Mapped[int]
    completion_tokens: Mapped[int]
    requests: Mapped[int]
    sum_steps_squared: Mapped[int]
    sum_accepted_squared: Mapped[int]
    sum_steps_accepted: Mapped[int]
    version_requests: Mapped[int]
    version_sum_steps_squared: Mapped[int]
    version_sum_accepted_squared: Mapped[int]
    version_sum_steps_accepted: Mapped[int]
    any_requests: Mapped[int]
    any_sum_steps_squared: Mapped[int]
    any_sum_accepted_squared: Mapped[int]
    any_sum_steps_accepted: Mapped[int]


class RequestTally(Base):
    """Steps and accepted proposals of one request under one version and draft shape: the cluster
    of a ratio's interval, and what the squares of ``acceptance_minute`` grow from."""

    __tablename__ = "request_tally"
    __table_args__ = ({"sqlite_with_rowid": False},)

    request_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    drafter_version_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    depth: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    topk: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    nodes: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # 0: not known
    mixed: Mapped[bool] = mapped_column(primary_key=True)
    verify_steps: Mapped[int]
    accepted: Mapped[int]


class Trace(Base):
    """The trace file of one request: hidden states of positions start .. end - 1."""

    __tablename__ = "trace"
    __table_args__ = (
        UniqueConstraint("uri"),
        Index(None, "created_at"),
        Index(None, "donor_id"),
        Index(None, "prefix_sha256"),
    )

    request_id: Mapped[int] = mapped_column(
        ForeignKey("request.id"), primary_key=True, autoincrement=False
    )
    uri: Mapped[str]  # relative to the artifact root
    bytes: Mapped[int]
    sha256: Mapped[str]
    created_at: Mapped[datetime]
    start: Mapped[int]
    end: Mapped[int]
    output_start: Mapped[int]
    prompt_sha256: Mapped[str]  # of the token ids [0:output_start], salted
    head_sha256: Mapped[str]  # of the first 16 token ids, salted
    greedy: Mapped[bool]
    aux_width: Mapped[int]
    last_width: Mapped[int]
    dtype: Mapped[str]
    pinned: Mapped[bool] = mapped_column(default=False)
    #: Hashes under a key of the store, of the prompt and of the first ``answer_tokens`` tokens of
    #: prompt and answer, by which a later turn is known; "": the client names its conversation.
    prompt_key: Mapped[str] = mapped_column(default="")
    answer_key: Mapped[str] = mapped_column(default="")
    answer_tokens: Mapped[int] = mapped_column(default=0)
    pin_reason: Mapped[str] = mapped_column(default="", server_default="")
    #: Of the token ids [0:start], whose rows another trace holds, salted. Empty: there are none, or
    #: the row is older than schema 0014.
    prefix_sha256: Mapped[str] = mapped_column(default="", server_default="")
    donor_id: Mapped[int | None]  # the request whose trace holds the row before ``start``
