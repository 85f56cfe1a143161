"""Traces: where the hidden states of a request lie."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from aurora_sgl import wire
from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import Erasure, Request, Server, Trace
from aurora_sgl.store.pruning.kept import HeldTrace
from aurora_sgl.store.queries.limits import is_of_group
from aurora_sgl.store.salt import Salt
from aurora_sgl.store.upsert import upsert
from aurora_sgl.trace_format import HEAD_TOKENS

#: Stands in ``request.conversation_hash`` where it was derived from the tokens: what is before it
#: decides the side of a request (see ``sequences.splits``).
DERIVED = ":"


def add_trace(
    s: Session,
    *,
    request_id: int,
    uri: str,
    bytes: int,
    sha256: str,
    start: int,
    end: int,
    output_start: int,
    prompt_sha256: str,
    head_sha256: str,
    greedy: bool,
    aux_width: int,
    last_width: int,
    dtype: str,
    prefix_sha256: str = "",
    created_at: datetime | None = None,
) -> None:
    """Record a trace file; a second file of the same request takes the place of the first. Hashes
    of tokens are kept salted.

    ``prefix_sha256``: of the tokens before ``start``. The request's row must exist (ingest its
    start first).
    """
    salt = Salt(s.connection())
    row = {
        "request_id": request_id,
        "uri": uri,
        "bytes": bytes,
        "sha256": sha256,
        "created_at": created_at or utc_now(),
        "start": start,
        "end": end,
        "output_start": output_start,
        "prompt_sha256": salt(prompt_sha256),
        "head_sha256": salt(head_sha256),
        "greedy": greedy,
        "aux_width": aux_width,
        "last_width": last_width,
        "dtype": dtype,
        "prefix_sha256": salt(prefix_sha256),
        "donor_id": None,
    }
    changed = [column for column in row if column not in ("request_id", "created_at")]
    upsert(
        s.connection(), Trace, [{**row, "pinned": False, "pin_reason": ""}], ["request_id"], changed
    )
    s.execute(update(Request).where(Request.id == request_id).values(traced=True))


@dataclass(frozen=True)
class StoredTurn:
    """A request whose conversation was derived, as later turns are told by."""

    request_id: int
    output_start: int
    prompt_key: str
    answer_key: str
    answer_tokens: int
    created_at: datetime
    conversation_hash: str


def unnamed_prompt(s: Session, request_id: int) -> str:
    """The salted hash of the prompt of a request with a trace whose client names no conversation;
    "" where it names one."""
    query = select(Request.conversation_hash, Trace.prompt_sha256).join(
        Trace, Trace.request_id == Request.id
    )
    row = s.execute(query.where(Request.id == request_id)).one_or_none()
    if row is None:
        return ""
    named = row.conversation_hash not in ("", row.prompt_sha256)
    return "" if named and DERIVED not in row.conversation_hash else row.prompt_sha256


def set_turn(
    s: Session,
    request_id: int,
    *,
    prompt_key: str,
    answer_key: str,
    answer_tokens: int,
    conversation: str,
) -> None:
    """Keep the derived conversation of a request, and by what later turns of it are known."""
    keys = {"prompt_key": prompt_key, "answer_key": answer_key, "answer_tokens": answer_tokens}
    s.execute(update(Trace).where(Trace.request_id == request_id).values(keys))
    s.execute(
        update(Request).where(Request.id == request_id).values(conversation_hash=conversation)
    )


def turns(s: Session, *, since: datetime | None, limit: int) -> list[StoredTurn]:
    """The newest turns, oldest first, of traces that were added after a moment."""
    t = Trace
    query = (
        select(
            *(t.request_id, t.output_start, t.prompt_key, t.answer_key, t.answer_tokens),
            *(t.created_at, Request.conversation_hash),
        )
        .join(Request, Request.id == t.request_id)
        .where(t.answer_key != "")
        .order_by(t.created_at.desc(), t.request_id.desc())
        .limit(limit)
    )
    if since is not None:
        query = query.where(t.created_at > since)
    return [StoredTurn(**row._mapping) for row in s.execute(query)][::-1]


def purges(s: Session) -> tuple[int, int]:
    """Changes whenever a purge begins, or has deleted its rows."""
    row = s.execute(select(func.max(Erasure.id), func.count(Erasure.rows_at))).one()
    return row[0] or 0, row[1]


def trace(s: Session, request_id: int) -> Trace | None:
    """Where the hidden states of a request lie; None when it has no trace, or no longer."""
    return s.get(Trace, request_id)


def traces_oldest_first(
    s: Session,
    limit: int | None = None,
    *,
    with_pinned: bool = False,
    group_id: int | None = None,
) -> Sequence[Trace]:
    query = select(Trace).order_by(Trace.created_at, Trace.request_id)
    if not with_pinned:
        query = query.where(~Trace.pinned)
    if group_id is not None:
        query = query.where(is_of_group(Trace.request_id, group_id))
    return s.scalars(query.limit(limit)).all()


def trace_bytes_total(s: Session, group_id: int | None = None) -> int:
    query = select(func.coalesce(func.sum(Trace.bytes), 0))
    if group_id is not None:
        query = query.where(is_of_group(Trace.request_id, group_id))
    return int(s.scalar(query) or 0)


def groups_of_traces(s: Session, request_ids: Collection[int]) -> Sequence[int]:
    """Ids of the groups that served these requests."""
    boots = {request_id >> wire.REQUEST_COUNTER_BITS for request_id in request_ids}
    return s.scalars(select(Server.group_id).distinct().where(Server.boot_id.in_(boots))).all()


def without_trace(s: Session, request_ids: Collection[int]) -> set[int]:
    """Those of these requests that have no row of a trace."""
    ids = list(request_ids)
    rest = set(ids)
    for begin in range(0, len(ids), 500):
        part = ids[begin : begin + 500]
        rest -= set(s.scalars(select(Trace.request_id).where(Trace.request_id.in_(part))))
    return rest


def trace_bytes_mean(s: Session) -> float:
    """Of one request's trace; 0 without any."""
    return float(s.scalar(select(func.avg(Trace.bytes))) or 0.0)


def delete_traces(s: Session, request_ids: Sequence[int]) -> None:
    """Forget these traces. Delete their files after the commit: a file without a row is only
    litter, a row without a file is a lie."""
    for begin in range(0, len(request_ids), 500):
        part = request_ids[begin : begin + 500]
        s.execute(delete(Trace).where(Trace.request_id.in_(part)))
        s.execute(update(Request).where(Request.id.in_(part)).values(traced=False))


def pin_traces(s: Session, request_ids: Sequence[int], reason: str) -> None:
    """Keep these traces, and those that hold their prefixes, for a ``reason``: the byte budget
    takes them last, up to a share of it, and neither they nor their requests grow too old, but for
    those of training's ``RESERVOIR``. A purge takes them like all others. A later reason replaces
    an earlier one."""
    _set_pins(s, request_ids, pinned=True, pin_reason=reason)


def unpin_traces(s: Session, request_ids: Sequence[int]) -> None:
    """Traces that are not pinned, or gone, are left as they are."""
    _set_pins(s, request_ids, pinned=False, pin_reason="")


def _set_pins(s: Session, request_ids: Sequence[int], *, pinned: bool, pin_reason: str) -> None:
    for begin in range(0, len(request_ids), 500):
        part = request_ids[begin : begin + 500]
        change = update(Trace).where(Trace.request_id.in_(part))
        s.execute(change.values(pinned=pinned, pin_reason=pin_reason))


def pinned_traces(s: Session, group_id: int, reason: str | None = None) -> list[int]:
    """Request ids of the traces that are pinned, for a reason or for any."""
    query = select(Trace.request_id).where(Trace.pinned, is_of_group(Trace.request_id, group_id))
    if reason is not None:
        query = query.where(Trace.pin_reason == reason)
    return list(s.scalars(query.order_by(Trace.request_id)))


def held_traces(s: Session, group_id: int) -> list[HeldTrace]:
    """All traces of a group, as retention looks at them."""
    query = (
        select(
            Trace.request_id,
            Trace.uri,
            Trace.bytes,
            Trace.created_at,
            Trace.donor_id,
            Trace.pinned,
            Request.conversation_hash,
            Trace.prompt_sha256,
        )
        .join(Request, Request.id == Trace.request_id)
        .where(is_of_group(Trace.request_id, group_id))
    )
    return [
        HeldTrace(*row[:6], key=row[6].partition(DERIVED)[0] or row[7])
        for row in s.execute(query).tuples()
    ]


# -- donors --------------------------------------------------------------------------------------


def donor_of_prefix(s: Session, group_id: int, prefix_sha256: str) -> int | None:
    """The request whose trace another one with this very prefix needs. The hash is salted."""
    donor = aliased(Trace)
    return s.scalar(
        select(Trace.donor_id)
        .join(donor, donor.request_id == Trace.donor_id)
        .where(Trace.prefix_sha256 == prefix_sha256, is_of_group(Trace.request_id, group_id))
        .limit(1)
    )


def may_hold(s: Session, trace: Trace, group_id: int, limit: int) -> Sequence[Trace]:
    """Traces that have a row of the position before this one's start, the newest first; whether
    they have its tokens too is for their files to say."""
    query = (
        select(Trace)
        .where(
            Trace.start < trace.start,
            Trace.end >= trace.start,
            Trace.request_id != trace.request_id,
            is_of_group(Trace.request_id, group_id),
        )
        .order_by(Trace.created_at.desc(), Trace.request_id.desc())
    )
    if trace.start >= HEAD_TOKENS:
        query = query.where(Trace.head_sha256 == trace.head_sha256)
    return s.scalars(query.limit(limit)).all()


def without_donor(s: Session, trace: Trace, group_id: int, limit: int) -> Sequence[Trace]:
    """Traces whose prefix nobody holds yet, and this one may, the newest first."""
    query = (
        select(Trace)
        .where(
            Trace.donor_id.is_(None),
            Trace.prefix_sha256 != "",
            Trace.start > trace.start,
            Trace.start <= trace.end,
            or_(Trace.head_sha256 == trace.head_sha256, Trace.start < HEAD_TOKENS),
            is_of_group(Trace.request_id, group_id),
        )
        .order_by(Trace.created_at.desc(), Trace.request_id.desc())
    )
    return s.scalars(query.limit(limit)).all()


def set_donor(s: Session, request_ids: Collection[int], donor_id: int) -> None:
    """That the trace of ``donor_id`` holds the row before the start of these."""
    s.execute(update(Trace).where(Trace.request_id.in_(request_ids)).values(donor_id=donor_id))
