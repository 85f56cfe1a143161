"""Case "a user id as domain, 10,000 of them": at most so many domains a group and day, the rest is
one, and all servers of a group agree which."""

from __future__ import annotations

import threading
from collections import Counter
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, func, select

from aurora_sgl import store, wire
from aurora_sgl.clock import from_us
from aurora_sgl.scheduler import metrics
from aurora_sgl.store import domains, queries
from aurora_sgl.store.domains import OTHER, day_of, limit_reached
from aurora_sgl.store.ingest import IngestRules, ingest
from aurora_sgl.store.models import AcceptanceMinute, Lease, Request
from tests.integration.store.test_ingest import register
from tests.support import store_samples as samples

RULES = IngestRules(most_domains=5)
DAY = day_of(from_us(samples.START_US))
ODD = ["%", "_", "a%", "A", "a", "a/b", "/", "客服", "'; --", "x" * 64, " a", "other ", "Default"]


def send(
    engine: Engine,
    server_id: int,
    names: list[str],
    *,
    boot: int = samples.BOOT,
    first: int = 1,
    at_us: int = samples.START_US,
    rules: IngestRules = RULES,
) -> None:
    """One request of one step for each name."""
    records: list[wire.Record] = []
    for number, name in enumerate(names, first):
        start = samples.started(number, domain=name, boot_id=boot, at_us=at_us)
        records += [start, samples.chain_step(number, 0, 1, boot_id=boot, at_us=at_us)]
    ingest(engine, server_id, boot, [(first, records)], rules=rules)


def stored(engine: Engine, column: object = Request.domain) -> set[str]:
    with store.reading(engine) as connection:
        return set(connection.scalars(select(column)))  # type: ignore[call-overload]


def test_the_first_names_of_a_day_are_kept_and_the_rest_is_one(engine: Engine) -> None:
    server_id = register(engine)
    send(engine, server_id, [f"user-{n}" for n in range(12)])
    expected = {f"user-{n}" for n in range(5)} | {OTHER}
    assert stored(engine) == stored(engine, AcceptanceMinute.domain) == expected
    with store.session(engine, write=False) as s:
        group_id = queries.servers.server(s, server_id).group_id
        assert limit_reached(s, group_id, DAY) == 5
        assert limit_reached(s, group_id, DAY - timedelta(days=1)) is None
    new = [f"user-{n}" for n in range(20, 32)]
    send(engine, server_id, new, first=50, at_us=wire.now_us())  # of today, which is another day
    with store.session(engine, write=False) as s:
        series = [dict(sample.labels) for sample in metrics.of_group(s, group_id)]
    names = [labels["domain"] for labels in series if "domain" in labels]
    assert set(names) == {f"user-{n}" for n in range(20, 25)} | {OTHER}
    assert max(Counter(names).values()) <= 2, "a gauge of each kind for a name"


def test_names_that_came_stay_and_those_of_every_request_count_for_nothing(engine: Engine) -> None:
    server_id = register(engine)
    send(engine, server_id, ["a", "b", "default", OTHER, "c", "d", "e", "f"])
    send(engine, server_id, ["f", "e", "a", "default"], first=50)
    assert stored(engine) == {"a", "b", "c", "d", "e", "default", OTHER}


def test_the_same_batch_again_gives_the_same_names(engine: Engine) -> None:
    server_id = register(engine)
    for _ in range(2):
        send(engine, server_id, [f"n{n}" for n in range(8)])
        assert stored(engine) == {*(f"n{n}" for n in range(5)), OTHER}


def test_every_day_has_names_of_its_own(engine: Engine) -> None:
    server_id = register(engine)
    send(engine, server_id, [f"a{n}" for n in range(8)])
    later = samples.START_US + 86_400_000_000
    send(engine, server_id, [f"b{n}" for n in range(8)], first=50, at_us=later)
    names = {f"{day}{n}" for day in "ab" for n in range(5)}
    assert stored(engine) == names | {OTHER}


@pytest.mark.parametrize("name", ODD)
def test_a_name_is_itself_whatever_it_is_made_of(engine: Engine, name: str) -> None:
    server_id = register(engine)
    send(engine, server_id, [name, "b", "c", "d"])
    domains._remembered.clear()  # as after a restart
    send(engine, server_id, [name, "b", "e", "f"], first=50)
    assert stored(engine) == {name, "b", "c", "d", "e", OTHER}


def test_servers_that_store_at_once_agree(engine: Engine, tmp_path: object) -> None:
    """Each with its own view of the day, as processes have; names of both come at the same time."""
    boots = {samples.BOOT: register(engine), 78: register(engine, 78)}
    other = store.connect(engine.url.render_as_string(hide_password=False))
    engines = dict(zip(boots, (engine, other), strict=True))
    gate = threading.Barrier(2)
    errors: list[BaseException] = []

    def work(boot: int) -> None:
        try:
            for batch in range(4):
                gate.wait()
                names = [f"{boot}-{batch}-{n}" for n in range(2)] + [f"both-{batch}"]
                send(engines[boot], boots[boot], names, boot=boot, first=1 + 10 * batch)
        except BaseException as error:
            errors.append(error)
            gate.abort()

    threads = [threading.Thread(target=work, args=(boot,)) for boot in boots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(stored(engine) - {OTHER}) == 5
    for batch in range(4):  # one name has one fate, whichever server it came to
        with store.reading(engine) as connection:
            rows = connection.execute(
                select(Request.domain, func.count()).group_by(Request.domain)
            ).all()
        assert dict(rows).get(f"both-{batch}", 2) == 2
    other.dispose()


def test_ten_thousand_names_take_no_more_statements_and_rows_than_a_few(engine: Engine) -> None:
    """So that the ingest is as fast, and pages and metrics as short."""
    server_id = register(engine)
    rules = IngestRules(most_domains=50)
    names = [f"user-{n}" for n in range(10_000)]
    at_us = int((datetime.now(UTC) - timedelta(minutes=10)).timestamp() * 1e6)

    def take(begin: int, end: int, first: int) -> int:
        """Statements that it takes."""
        statements = 0

        def count(*_: object) -> None:
            nonlocal statements
            statements += 1

        event.listen(engine, "before_cursor_execute", count)
        send(engine, server_id, names[begin:end], first=first, at_us=at_us, rules=rules)
        event.remove(engine, "before_cursor_execute", count)
        return statements

    take(0, 100, 1)
    assert take(0, 100, 1_000) == take(5_000, 5_100, 2_000)
    for begin in range(0, 10_000, 1_000):
        take(begin, begin + 1_000, 10_000 + begin)
    with store.reading(engine) as connection:
        assert connection.scalar(select(func.count()).select_from(AcceptanceMinute)) == 51
        assert connection.scalar(select(func.count()).select_from(Lease)) == 51
    with store.session(engine, write=False) as s:
        series = metrics.of_group(s, queries.servers.server(s, server_id).group_id)
    by_domain = [dict(one.labels)["domain"] for one in series if "domain" in dict(one.labels)]
    assert set(Counter(by_domain).values()) == {2}  # accept length, and steps
    assert {*by_domain} == {*names[:50], OTHER}


def test_a_batch_that_is_given_back_leaves_no_name_behind(engine: Engine) -> None:
    server_id = register(engine)
    wrong = samples.chain_step(9, 0, 1, boot_id=5)
    start = samples.started(9, domain="lost")
    with pytest.raises(Exception, match="not one of boot"):
        ingest(engine, server_id, samples.BOOT, [(1, [start, wrong])], rules=RULES)
    send(engine, server_id, [f"n{n}" for n in range(8)])
    assert stored(engine) == {*(f"n{n}" for n in range(5)), OTHER}


def test_leases_of_names_end(engine: Engine) -> None:
    server_id = register(engine)
    send(engine, server_id, ["a"])
    with engine.begin() as connection:
        ended = datetime.now(UTC) - timedelta(seconds=1)
        connection.execute(Lease.__table__.update().values(expires_at=ended))
    send(engine, server_id, ["b"], first=50, at_us=samples.START_US + 86_400_000_000)
    with store.reading(engine) as connection:
        days = {name.split("/")[2] for name in connection.scalars(select(Lease.name))}
    assert days == {(DAY + timedelta(days=1)).isoformat()}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.dates(date(2026, 1, 1), date(2026, 1, 2)), st.text(max_size=3)),
                max_size=12))  # fmt: skip
def test_never_more_than_the_most(wanted: list[tuple[date, str]]) -> None:
    sqlite = store.connect("sqlite://")
    Lease.metadata.create_all(sqlite, tables=[Lease.__table__])  # type: ignore[list-item]
    clean = [(day, name.replace("\x00", "")) for day, name in wanted]
    clean = [(day, name.encode("utf-8", "replace").decode()) for day, name in clean]
    with sqlite.begin() as connection:
        names = domains.DomainNames(connection, 1, 3)
        first = names.settle(clean)
        assert domains.DomainNames(connection, 1, 3).settle(clean) == first
    for day in {day for day, _ in clean}:
        own = {name for (one, _), name in first.items() if one == day} - domains.ALWAYS
        assert len(own) <= 3
    assert all(name in (asked, OTHER) for (_, asked), name in first.items())
    sqlite.dispose()
