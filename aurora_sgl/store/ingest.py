"""From records of the engine to rows, once each.

One transaction a batch. The row lock on ``spool_watermark`` lets one ingest of a boot in at a
time; under it the keys that are already there are looked up, so what is inserted, and what the
roll-ups and the counters of requests grow by, is exactly what was not there before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sqlalchemy import Connection, Engine, String, bindparam, case, or_, select, update

from aurora_sgl import wire
from aurora_sgl.clock import from_us, utc_now
from aurora_sgl.store.domains import DomainNames, Wanted, day_of
from aurora_sgl.store.erased import without_erased
from aurora_sgl.store.events import insert_events
from aurora_sgl.store.faults import BadRecord, LostRow, StoreBehind
from aurora_sgl.store.models import (
    AcceptanceMinute,
    DropCount,
    Request,
    RequestTally,
    Server,
    SpoolWatermark,
)
from aurora_sgl.store.partitions import ensure_partitions
from aurora_sgl.store.queries.swaps import add_swaps
from aurora_sgl.store.queries.versions import known_version
from aurora_sgl.store.rollup import (
    MIXED,
    Minute,
    MinuteKey,
    RequestSums,
    Tally,
    TallyKey,
    add_lists,
    per_position,
    roll_up,
    tally_key,
)
from aurora_sgl.store.salt import Salt
from aurora_sgl.store.sqlite_file import bound_log
from aurora_sgl.store.store_clock import StoreNow
from aurora_sgl.store.stored_steps import without_stored
from aurora_sgl.store.upsert import insert, insert_missing, storable, upsert

#: Values of one IN list; both databases take more, plans get no better.
_CHUNK = 400

Batch = Sequence[tuple[int, Sequence[wire.Record]]]


@dataclass(frozen=True)
class IngestRules:
    """What is left out of what clients and engines send; see the settings of the same names."""

    keep_opted_out_tokens: bool = False
    most_domains: int = 200


RULES = IngestRules()


@dataclass(frozen=True)
class IngestResult:
    inserted_events: int
    duplicate_events: int
    last_seq: int  # watermark of the boot after this batch
    purged_records: int = 0  # that were left out because their request was purged


def ingest(
    engine: Engine,
    server_id: int,
    boot_id: int,
    batch: Batch,
    *,
    partial: bool = False,
    expected: int = 0,
    rules: IngestRules = RULES,
) -> IngestResult:
    """Take envelopes ``(seq, records)`` of one boot. The same batch again changes nothing.

    A step whose request's start never came gets a request in the domain ``default`` that may not
    be trained on. What was purged (``store.erased``) is left out. Of a request that may not be
    trained on, events have counts and no tokens, though older engines send them; a domain beyond
    the day's names is ``domains.OTHER``. ``partial``: more of the last envelope follows, the
    watermark stays. ``expected``: what the watermark was before; ``StoreBehind`` when it is less.
    Raises ``LostRow`` for an unknown server, ``BadRecord`` for a step of another boot, and what the
    database and its driver raise (see ``store.faults``);
    nothing is stored then.
    """
    steps = _steps(batch)
    ensure_partitions(engine, (from_us(us) for us in {step.at_us for step in steps}))
    with engine.begin() as connection:
        result, names = _take(connection, server_id, boot_id, batch, partial, expected, rules)
    names.committed()
    bound_log(engine)
    return result


def rehearse(engine: Engine, server_id: int, boot_id: int) -> None:
    """Take a sound record of each kind and give it back. Raises what the database raises: where
    it does, a record that was refused was not to blame."""
    ensure_partitions(engine)
    with engine.connect() as connection, connection.begin() as transaction:
        sound = _sound_records(boot_id)
        _take(connection, server_id, boot_id, [(1, sound)], partial=True, expected=0, rules=RULES)
        transaction.rollback()


def _take(
    connection: Connection,
    server_id: int,
    boot_id: int,
    batch: Batch,
    partial: bool,
    expected: int,
    rules: IngestRules,
) -> tuple[IngestResult, DomainNames]:
    taken = _lock_watermark(connection, server_id, boot_id)
    if taken < expected:
        raise StoreBehind(boot_id, taken)
    count = sum(len(part) for _, part in batch)
    batch = without_erased(connection, batch)
    records = list(chain.from_iterable(part for _, part in batch))
    steps = _steps(batch)
    boot_version_id, group_id = _boot(connection, server_id, boot_id)
    names = DomainNames(connection, group_id, rules.most_domains)
    _start_requests(connection, server_id, boot_id, records, names)
    new = without_stored(connection, steps)
    clusters = {tally_key(step, step.version_id or boot_version_id) for step in new}
    rows = _requests(connection, {step.request_id for step in new})
    tallies = _load_tallies(connection, set(rows))
    domains = {request_id: row.domain for request_id, row in rows.items()}
    minutes, sums = roll_up(new, boot_version_id, domains, tallies)
    bare = {request_id for request_id, row in rows.items() if not row.may_train}
    insert_events(connection, new, boot_version_id, () if rules.keep_opted_out_tokens else bare)
    _store_tallies(connection, {key: tallies[key] for key in clusters})
    store_minutes(connection, server_id, minutes)
    _count_requests(connection, sums)
    _finish_requests(connection, records)
    fresh = chain.from_iterable(part for seq, part in batch if seq > taken)
    _update_server(connection, server_id, fresh)
    add_swaps(connection, server_id, (r for r in records if isinstance(r, wire.SwapDone)))
    last = taken if partial else max([taken, *(seq for seq, _ in batch)])
    connection.execute(
        update(SpoolWatermark)
        .where(SpoolWatermark.server_id == server_id, SpoolWatermark.boot_id == boot_id)
        .values(last_seq=last, updated_at=utc_now())
    )
    return IngestResult(len(new), len(steps) - len(new), last, count - len(records)), names


def _steps(batch: Batch) -> list[wire.VerifyStep]:
    return [one for _, part in batch for one in part if isinstance(one, wire.VerifyStep)]


def _sound_records(boot_id: int) -> list[wire.Record]:
    """One of each kind, of a request whose number no real one has."""
    request_id, now = boot_id << wire.REQUEST_COUNTER_BITS, wire.now_us()
    return [
        wire.Hello(boot_id, 1, {}, 0, 0, 1, {}),
        wire.RequestStarted(request_id, now, "", 0, "default", "", 1, 0, {}, False, False, True),
        wire.VerifyStep(
            request_id, 0, now, 0, 0, False, 1, 1, 1, 2, "greedy", 1, 1, 0, 1, 1, [1], [0], [], [1]
        ),
        wire.RequestFinished(request_id, now, "finished", "", 2, 0, 1, 1, 0, 0),
        wire.SwapDone(boot_id, now, 1, True, "", "", 1.0, 1.0),
    ]


def _lock_watermark(connection: Connection, server_id: int, boot_id: int) -> int:
    row = {"server_id": server_id, "boot_id": boot_id, "last_seq": 0, "updated_at": utc_now()}
    insert_missing(connection, SpoolWatermark, [row], ["server_id", "boot_id"])
    taken = connection.scalar(
        select(SpoolWatermark.last_seq)
        .where(SpoolWatermark.server_id == server_id, SpoolWatermark.boot_id == boot_id)
        .with_for_update()
    )
    return int(taken or 0)


def _boot(connection: Connection, server_id: int, boot_id: int) -> tuple[int, int]:
    """(the version that it was started with or 0, its group)."""
    row = connection.execute(
        select(Server.boot_version_id, Server.boot_id, Server.group_id).where(
            Server.id == server_id
        )
    ).one_or_none()
    if row is None or row.boot_id != boot_id:
        raise LostRow(f"server {server_id} is not registered with boot {boot_id}")
    return row.boot_version_id or 0, row.group_id


def _start_requests(
    connection: Connection,
    server_id: int,
    boot_id: int,
    records: Sequence[wire.Record],
    names: DomainNames,
) -> None:
    domains = names.settle(_wanted(one) for one in records if isinstance(one, wire.RequestStarted))
    started: dict[int, dict[str, Any]] = {}
    orphans: dict[int, dict[str, Any]] = {}
    salt = Salt(connection)
    for record in records:
        if isinstance(record, wire.RequestStarted):
            started[record.request_id] = {
                "id": record.request_id,
                "server_id": server_id,
                "admitted_at": from_us(record.at_us),
                "rid": storable(record.rid),
                "dp_rank": record.dp_rank,
                "domain": domains[_wanted(record)],
                "conversation_hash": salt(record.conversation_hash),
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                "sampling": storable(record.sampling),
                "may_train": record.may_train,
                "traced": False,
                "speculates": record.speculates,
            }
        elif isinstance(record, wire.VerifyStep | wire.RequestFinished):
            if record.request_id >> wire.REQUEST_COUNTER_BITS != boot_id:
                raise BadRecord(
                    f"request {record.request_id} is not one of boot {boot_id}; "
                    "the spool belongs to another server"
                )
            if record.request_id not in orphans:
                orphans[record.request_id] = {
                    "id": record.request_id,
                    "server_id": server_id,
                    "admitted_at": from_us(record.at_us),
                }
    columns = ("rid", "dp_rank", "domain", "prompt_tokens", "sampling", "may_train", "speculates",
               "admitted_at")  # fmt: skip
    filled = ["conversation_hash"]  # what was derived since stays
    upsert(connection, Request, list(started.values()), ["id"], columns, filled)
    rest = [row for request_id, row in orphans.items() if request_id not in started]
    insert_missing(connection, Request, rest, ["id"])


def _wanted(record: wire.RequestStarted) -> Wanted:
    return day_of(from_us(record.at_us)), storable(record.domain)


def _load_tallies(connection: Connection, request_ids: set[int]) -> dict[TallyKey, Tally]:
    """All that these requests have."""
    ids = sorted(request_ids)
    tally = RequestTally
    query = select(tally).where(tally.request_id.in_(bindparam("ids", expanding=True)))
    tallies: dict[TallyKey, Tally] = {}
    for begin in range(0, len(ids), _CHUNK):
        for row in connection.execute(query, {"ids": ids[begin : begin + _CHUNK]}):
            key = TallyKey(*(getattr(row, name) for name in TallyKey._fields))
            tallies[key] = Tally(row.verify_steps, row.accepted)
    return tallies


def _store_tallies(connection: Connection, tallies: dict[TallyKey, Tally]) -> None:
    rows = [
        {**key._asdict(), "verify_steps": tally.verify_steps, "accepted": tally.accepted}
        for key, tally in tallies.items()
    ]
    upsert(connection, RequestTally, rows, TallyKey._fields, ["verify_steps", "accepted"])


def _requests(connection: Connection, request_ids: set[int]) -> dict[int, Any]:
    """Domain and consent of requests, as they are stored."""
    ids = sorted(request_ids)
    query = select(Request.id, Request.domain, Request.may_train).where(
        Request.id.in_(bindparam("ids", expanding=True))
    )
    rows: dict[int, Any] = {}
    for begin in range(0, len(ids), _CHUNK):
        for row in connection.execute(query, {"ids": ids[begin : begin + _CHUNK]}):
            rows[row.id] = row
    return rows


def store_minutes(connection: Connection, server_id: int, minutes: dict[MinuteKey, Minute]) -> None:
    """Add to rows of this server (a purge: sums below zero); the watermark's lock keeps every
    other writer of them out."""
    if not minutes:
        return
    m = AcceptanceMinute
    times = [key.minute_us for key in minutes]
    stored: dict[MinuteKey, Any] = {}
    query = select(m).where(
        m.server_id == server_id, m.bucket_start.between(from_us(min(times)), from_us(max(times)))
    )
    for row in connection.execute(query):
        minute_us = round(row.bucket_start.timestamp()) * 1_000_000
        key = MinuteKey(minute_us, *(getattr(row, name) for name in MinuteKey._fields[1:]))
        stored[key] = row
    rows = []
    for key, minute in minutes.items():
        old = stored.get(key)
        grown = minute.sums()
        values = {name: more + (getattr(old, name) if old else 0) for name, more in grown.items()}
        histogram = add_lists(minute.histogram, list(old.histogram) if old else [])
        rows.append(
            {
                **{name: value for name, value in key._asdict().items() if name != "minute_us"},
                "bucket_start": from_us(key.minute_us),
                "server_id": server_id,
                **values,
                "histogram": histogram,
                "per_position": per_position(histogram),
            }
        )
    key_columns = ["bucket_start", "server_id", *MinuteKey._fields[1:]]
    upsert(connection, m, rows, key_columns, [*Minute().sums(), "histogram", "per_position"])


def _count_requests(connection: Connection, sums: dict[int, RequestSums]) -> None:
    """A running request has one token from its prefill and those that its steps kept; a finished
    one has what the engine said."""
    if not sums:
        return
    table = Request.__table__
    started = case((table.c.verify_steps == 0, 1), else_=0)
    rule = bindparam("rule", type_=String)
    connection.execute(
        update(Request)
        .where(table.c.id == bindparam("key"))
        .values(
            verify_steps=table.c.verify_steps + bindparam("steps"),
            proposed=table.c.proposed + bindparam("more_proposed"),
            accepted=table.c.accepted + bindparam("more_accepted"),
            accept_rule=case(
                (or_(table.c.accept_rule == "", table.c.accept_rule == rule), rule), else_=MIXED
            ),
            completion_tokens=case(
                (
                    table.c.status == "running",
                    table.c.completion_tokens + started + bindparam("kept"),
                ),
                else_=table.c.completion_tokens,
            ),
        ),
        [
            {
                "key": request_id,
                "steps": s.verify_steps,
                "more_proposed": s.proposed,
                "more_accepted": s.accepted,
                "kept": s.kept,
                "rule": s.accept_rule,
            }
            for request_id, s in sums.items()
        ],
    )


def _finish_requests(connection: Connection, records: Iterable[wire.Record]) -> None:
    rows = {
        record.request_id: {
            "key": record.request_id,
            "finished_at": from_us(record.at_us),
            "status": record.status,
            "finish_reason": storable(record.finish_reason),
            "completion_tokens": record.completion_tokens,
            "cached_tokens": record.cached_tokens,
            "reported_verify_steps": record.verify_steps,
            "reported_proposed": record.proposed,
            "reported_accepted": record.accepted,
            "retractions": record.retractions,
        }
        for record in records
        if isinstance(record, wire.RequestFinished)
    }
    if rows:
        connection.execute(
            update(Request).where(Request.__table__.c.id == bindparam("key")), list(rows.values())
        )


def _live(version_id: int, hashed: int) -> dict[str, Any]:
    """What a Hello says of the live drafter: not its hash, which comes some steps after the swap.
    Until then the hash of the drafter before must not stand beside the new version."""
    live_version_id = known_version(version_id)
    if version_id == hashed:
        return {"live_version_id": live_version_id}
    kept = case((Server.live_version_id == version_id, Server.live_sha256), else_="")
    return {"live_version_id": live_version_id, "live_sha256": "" if hashed else kept}


def _update_server(connection: Connection, server_id: int, records: Iterable[wire.Record]) -> None:
    """What the engine said of itself; only from envelopes that were not taken before, so that a
    retry doesn't bring back an old state."""
    change: dict[str, Any] = {}
    dropped = hashed = 0  # the version whose hash these records say
    for record in records:
        if isinstance(record, wire.Hello):
            change["counters"] = storable(record.counters)
            change["notices"] = storable(record.notices)
            change["last_seen_at"] = StoreNow()
            if record.live_version_id:
                change |= _live(record.live_version_id, hashed)
            dropped = max(dropped, record.dropped)
        elif isinstance(record, wire.SwapDone) and record.ok:
            hashed = record.version_id
            change["live_version_id"] = known_version(record.version_id)
            change |= {"live_sha256": record.live_sha256, "last_error": ""}
        elif isinstance(record, wire.SwapDone):
            change["last_error"] = f"version {record.version_id} was refused: {record.reason}"
    if change:
        connection.execute(update(Server).where(Server.id == server_id).values(change))
    if dropped:
        row = {
            "server_id": server_id,
            "place": "engine",
            "count": dropped,
            "updated_at": utc_now(),
        }
        connection.execute(
            insert(connection, DropCount)
            .values(row)
            .on_conflict_do_update(
                index_elements=["server_id", "place"],
                set_={"count": dropped, "updated_at": row["updated_at"]},
                where=DropCount.count < dropped,
            )
        )
