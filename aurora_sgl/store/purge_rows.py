"""The rows of a purge, chunk by chunk.

Every chunk is one transaction that notes the numbers of its requests (``store.erased``), takes
their steps out of the roll-ups and deletes their rows. A purge that is stopped goes on with the
next chunk when it is called again. Roll-ups stay exact: a request's own share of a minute is what
:func:`~aurora_sgl.store.rollup.roll_up` makes of its steps alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    delete,
    exists,
    func,
    select,
    true,
    update,
)

from aurora_sgl import wire
from aurora_sgl.clock import from_us, to_us, utc_now
from aurora_sgl.store.compact import overwrite_what_goes
from aurora_sgl.store.connection import reading
from aurora_sgl.store.domains import names_of_days
from aurora_sgl.store.erased import add_erased, erased_ids, rules_of
from aurora_sgl.store.ingest import store_minutes
from aurora_sgl.store.models import (
    AcceptanceEvent,
    AcceptanceMinute,
    Base,
    ErasedRequest,
    Erasure,
    Request,
    RequestTally,
    Server,
    SpoolWatermark,
    Trace,
    TrainingRequest,
    TrainingRun,
)
from aurora_sgl.store.pruning.minutes import coarsen, is_within_an_hour
from aurora_sgl.store.purge import RowCounts, Selector
from aurora_sgl.store.rollup import (
    MINUTE_US,
    Minute,
    MinuteKey,
    Tally,
    TallyKey,
    add_lists,
    roll_up,
    tally_key,
)
from aurora_sgl.store.scrub import forget_requests

#: Requests of one transaction.
CHUNK = 100
_MINUTE, _HOUR = timedelta(minutes=1), timedelta(hours=1)
HOUR_US = 60 * MINUTE_US


#: The column by which each table's rows belong to requests; ``erased_request`` has nothing else.
OF_REQUESTS = [
    table.c.request_id
    for table in Base.metadata.sorted_tables
    if "request_id" in table.c and table.name != ErasedRequest.__tablename__
]


@dataclass
class PurgedChunk:
    uris: list[str] = field(default_factory=list)  # of trace files that no row names any more


def count_rows(engine: Engine, selector: Selector) -> tuple[RowCounts, list[int]]:
    """What a purge would take, and the runs that learnt from it, before it does."""
    tables = {"requests": Request.id, "events": AcceptanceEvent.request_id}
    tables["traces"] = Trace.request_id
    runs: set[int] = set()
    with reading(engine) as connection:
        condition = selector.condition(connection)
        ids = select(Request.id).where(condition)
        counts = {
            name: connection.scalar(select(func.count()).where(column.in_(ids))) or 0
            for name, column in tables.items()
        }
        after = 0
        while requests := connection.execute(_next(condition, after)).all():
            runs |= _runs_of(connection, requests)
            after = requests[-1].id
    return RowCounts(**counts), sorted(runs)


def purged_again(engine: Engine) -> Iterator[tuple[int, list[int]]]:
    """Requests that are in the store although they were purged, as after a restore of an older
    backup: the purge, and some of its requests."""
    after = 0
    while True:
        with reading(engine) as connection:
            rules = rules_of(connection)
            requests = connection.execute(_next(true(), after)).all() if rules else []
            if not requests:
                return
            purged = erased_ids(connection, [row.id for row in requests])
        of_purge: dict[int, list[int]] = defaultdict(list)
        for row in requests:
            number = rules.erasure_of(dict(row._mapping), to_us(row.admitted_at))
            if number or row.id in purged:
                of_purge[number].append(row.id)
        yield from of_purge.items()
        after = requests[-1].id


def purge_noted(engine: Engine) -> Iterator[PurgedChunk]:
    """Remove what is noted as purged and has rows all the same: a spool knew more of it than the
    store, such as the name of a domain beyond the day's limit."""
    n = ErasedRequest
    with reading(engine) as connection:
        noted = select(n.erasure_id).join(Request, Request.id == n.request_id).distinct()
        numbers = sorted(connection.scalars(noted))
    for number in numbers:
        of_purge = Request.id.in_(select(n.request_id).where(n.erasure_id == number))
        while (chunk := purge_chunk(engine, number, of_purge)) is not None:
            yield chunk
        forget_requests(engine, number)


def purge_chunk(
    engine: Engine, erasure_id: int, condition: ColumnElement[bool]
) -> PurgedChunk | None:
    """Remove the next requests under a condition; ``None``: there are none left."""
    with engine.begin() as connection:
        overwrite_what_goes(connection)
        _lock_boots(connection, condition)
        requests = connection.execute(_next(condition, 0).with_for_update()).all()
        if not requests:
            return None
        ids = [row.id for row in requests]
        add_erased(connection, dict.fromkeys(ids, erasure_id))
        runs = _runs_of(connection, requests)
        uris = connection.scalars(select(Trace.uri).where(Trace.request_id.in_(ids))).all()
        steps = _steps(connection, ids)
        _take_out_of_minutes(connection, requests, steps)
        for column in (*OF_REQUESTS, Request.__table__.c.id):
            connection.execute(delete(column.table).where(column.in_(ids)))
        lacking = _without_all_steps(requests, steps)
        _drop_minutes_of_one(connection, lacking)
        servers = {row.server_id for row in requests}
        groups = connection.scalars(
            select(Server.group_id).where(Server.id.in_(servers)).distinct()
        )
        counts = RowCounts(len(ids), len(steps), len(uris))
        _note(connection, erasure_id, counts, runs=set(runs), groups=set(groups))
        return PurgedChunk(list(uris))


def _next(condition: ColumnElement[bool], after: int) -> Select[*tuple[Any, ...]]:
    """The next requests under a condition, by number."""
    r = Request
    columns = (
        *(r.id, r.server_id, r.domain, r.admitted_at, r.finished_at, r.verify_steps),
        *(r.may_train, r.traced, r.rid, r.conversation_hash),
    )
    return select(*columns).where(condition, r.id > after).order_by(r.id).limit(CHUNK)


def _lock_boots(connection: Connection, condition: ColumnElement[bool]) -> None:
    """Keep ingest from the rows of these boots: it adds to the same minutes."""
    servers = select(Request.server_id).where(condition).order_by(Request.id).limit(CHUNK)
    w = SpoolWatermark
    wanted = select(w.server_id).where(w.server_id.in_(set(connection.scalars(servers))))
    connection.execute(wanted.order_by(w.server_id, w.boot_id).with_for_update())


def _steps(connection: Connection, ids: Sequence[int]) -> list[wire.VerifyStep]:
    """The steps of requests without their tokens, in order."""
    e = AcceptanceEvent
    rows = connection.execute(
        select(
            e.request_id, e.step, e.at, e.drafter_version_id, e.mixed, e.depth, e.topk, e.nodes,
            e.accept_rule, e.batch_size, e.proposed, e.accepted, e.kept,
        )
        .where(e.request_id.in_(ids))
        .order_by(e.request_id, e.step)
    )  # fmt: skip
    return [
        wire.VerifyStep(
            row.request_id, row.step, to_us(row.at),
            row.drafter_version_id, 0, row.mixed, 0, row.depth, row.topk, row.nodes,
            row.accept_rule, row.batch_size, row.proposed, row.accepted, row.kept, 0,
            [], [], [], [],
        )
        for row in rows
    ]  # fmt: skip


def _take_out_of_minutes(
    connection: Connection, requests: Sequence[Any], steps: Sequence[wire.VerifyStep]
) -> None:
    """Subtract what these steps added, server by server."""
    tallies = _tallies_before(connection, [row.id for row in requests], steps)
    server_of = {row.id: row.server_id for row in requests}
    domains = {row.id: row.domain for row in requests}
    of_server: dict[int, list[wire.VerifyStep]] = defaultdict(list)
    for step in steps:
        of_server[server_of[step.request_id]].append(step)
    m = AcceptanceMinute
    for server_id, part in of_server.items():
        minutes, _ = roll_up(part, 0, domains, tallies)
        store_minutes(connection, server_id, _as_stored(connection, server_id, minutes))
        connection.execute(delete(m).where(m.server_id == server_id, m.verify_steps <= 0))


def _tallies_before(
    connection: Connection, ids: Sequence[int], steps: Iterable[wire.VerifyStep]
) -> dict[TallyKey, Tally]:
    """All clusters as they were before these steps: more than nothing where older ones went."""
    t = RequestTally
    tallies = {
        TallyKey(*(getattr(row, name) for name in TallyKey._fields)): Tally(
            row.verify_steps, row.accepted
        )
        for row in connection.execute(select(t).where(t.request_id.in_(ids)))
    }
    for step in steps:
        tally = tallies.get(tally_key(step, step.version_id))
        if tally is not None:
            tally.verify_steps -= 1
            tally.accepted -= step.accepted
    return {key: tally for key, tally in tallies.items() if tally.verify_steps >= 0}


def _as_stored(
    connection: Connection, server_id: int, minutes: Mapping[MinuteKey, Minute]
) -> dict[MinuteKey, Minute]:
    """The same below zero, of the row where each lies. Old minutes are summed up to hours, to which
    a late record may have added minutes again: those are summed up as well then. What lies nowhere
    any more is left out."""
    of_hour: dict[int, dict[MinuteKey, Minute]] = defaultdict(dict)
    for key, minute in minutes.items():
        of_hour[key.minute_us - key.minute_us % HOUR_US][key] = minute
    stored: dict[MinuteKey, Minute] = {}
    for hour_us, part in of_hour.items():
        left = _rows_of_hour(connection, server_id, hour_us)
        is_fine = all(left.get(key, 0) >= one.verify_steps for key, one in part.items())
        if not is_fine:
            coarsen(connection, server_id, from_us(hour_us))
            left = _rows_of_hour(connection, server_id, hour_us)
        for key, minute in part.items():
            place = key if is_fine else key._replace(minute_us=hour_us)
            if left.get(place, 0) >= minute.verify_steps:
                left[place] -= minute.verify_steps
                _subtract(stored.setdefault(place, Minute()), minute)
    return stored


def _rows_of_hour(connection: Connection, server_id: int, hour_us: int) -> dict[MinuteKey, int]:
    """The rows of a server in an hour, and how many steps each has."""
    m = AcceptanceMinute
    hour = from_us(hour_us)
    columns = [getattr(m, name) for name in MinuteKey._fields[1:]]
    rows = connection.execute(
        select(m.bucket_start, *columns, m.verify_steps).where(
            m.server_id == server_id, m.bucket_start >= hour, m.bucket_start < hour + _HOUR
        )
    )
    return {MinuteKey(to_us(row[0]), *row[1:-1]): row.verify_steps for row in rows}


def _subtract(total: Any, part: Any) -> None:
    """Sums of the same kind, those within them too."""
    for one in fields(total):
        value, old = getattr(part, one.name), getattr(total, one.name)
        if isinstance(value, list):
            setattr(total, one.name, add_lists([-count for count in value], old))
        elif isinstance(value, int):
            setattr(total, one.name, old - value)
        else:
            _subtract(old, value)


def _without_all_steps(
    requests: Sequence[Any], steps: Iterable[wire.VerifyStep]
) -> list[tuple[int, str, datetime, datetime]]:
    """Server, domain, begin and end of requests whose steps are not all there any more (they are
    pruned after a month): what these added to minutes nobody can tell."""
    counts = Counter(step.request_id for step in steps)
    return [
        (row.server_id, row.domain, row.admitted_at, row.finished_at or utc_now())
        for row in requests
        if counts[row.id] < row.verify_steps
    ]


def _drop_minutes_of_one(
    connection: Connection, requests: Iterable[tuple[int, str, datetime, datetime]]
) -> None:
    """Delete the minutes (or hours) of a server and domain in which nobody else was served: they
    would be the roll-up of one request. After the requests' rows."""
    m = AcceptanceMinute
    for server_id, domain, begin, end in requests:
        mine = (m.server_id == server_id) & (m.domain == domain)
        first = from_us(to_us(begin) - to_us(begin) % HOUR_US)
        within = select(m.bucket_start).where(mine, m.bucket_start.between(first, end)).distinct()
        buckets = set(connection.scalars(within))
        for bucket in buckets:
            # A row at the hour that has no minute beside it may be the hour's.
            is_minute = to_us(bucket) % HOUR_US or any(
                bucket < one < bucket + _HOUR for one in buckets
            )
            stop = bucket + (_MINUTE if is_minute else _HOUR)
            if stop > begin and not _serves_others(connection, server_id, domain, bucket, stop):
                connection.execute(delete(m).where(mine, m.bucket_start == bucket))


def _serves_others(
    connection: Connection, server_id: int, domain: str, begin: datetime, end: datetime
) -> bool:
    r = Request
    others = exists().where(
        r.server_id == server_id,
        r.domain == domain,
        r.admitted_at < end,
        r.finished_at.is_(None) | (r.finished_at >= begin),
    )
    return bool(connection.scalar(select(others)))


def drop_minutes(engine: Engine, until: datetime, domain: str | None = None) -> int:
    """Delete the roll-ups of up to a moment, of one domain or all, in which nothing but what was
    purged can be; how many rows. A row at the hour may be the whole hour's."""
    m = AcceptanceMinute
    whole = is_within_an_hour() & (m.bucket_start <= until - _MINUTE)
    covered = delete(m).where(whole | (m.bucket_start <= until - _HOUR))
    if domain is not None:
        covered = covered.where(m.domain == domain)
    with engine.begin() as connection:
        overwrite_what_goes(connection)
        return connection.execute(covered).rowcount


def purged_domains(engine: Engine) -> dict[str, datetime]:
    """Domains that were purged and are named in roll-ups, or among the names of a day: until
    when."""
    with reading(engine) as connection:
        rules = rules_of(connection)
        domains = {*connection.scalars(select(AcceptanceMinute.domain).distinct())}
        domains |= names_of_days(connection)
    untils = {domain: [until for until, _ in rules.of_text("domain", domain)] for domain in domains}
    return {domain: from_us(max(moments)) for domain, moments in untils.items() if moments}


def _runs_of(connection: Connection, requests: Sequence[Any]) -> set[int]:
    """Runs that learnt from these requests, or may have: older runs say only from when to when
    theirs finished."""
    t, run = TrainingRequest, TrainingRun
    ids = [row.id for row in requests]
    runs = set(connection.scalars(select(t.run_id).where(t.request_id.in_(ids)).distinct()))
    for server_id in {row.server_id for row in requests}:
        times = [
            row.finished_at
            for row in requests
            if row.server_id == server_id and row.traced and row.may_train and row.finished_at
        ]
        if times:
            group = select(Server.group_id).where(Server.id == server_id).scalar_subquery()
            unlisted = ~exists().where(t.run_id == run.id)
            runs |= set(
                connection.scalars(
                    select(run.id).where(
                        run.group_id == group,
                        run.window_start <= max(times),
                        run.window_end >= min(times),
                        unlisted,
                    )
                )
            )
    return runs


def _note(connection: Connection, erasure_id: int, counts: RowCounts, **numbers: set[int]) -> None:
    """What went, from which groups, and which runs learnt from it, in the row of the purge."""
    e = Erasure
    old = connection.scalar(select(e.details).where(e.id == erasure_id))
    if old is None:  # of a purge whose row a restore did not bring back
        return
    total = RowCounts.of(old)
    details: dict[str, Any] = {
        one.name: getattr(total, one.name) + getattr(counts, one.name) for one in fields(RowCounts)
    }
    for name, more in numbers.items():
        details[name] = sorted({*old.get(name, ()), *more})
    connection.execute(update(e).where(e.id == erasure_id).values(details={**old, **details}))
