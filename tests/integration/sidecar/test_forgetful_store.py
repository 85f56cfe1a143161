"""A store that has less than it had, a cursor that is gone, envelopes that are missing: all that
the spool still has comes back, once, and what is lost is counted in records."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, create_engine, text

from aurora_sgl import wire
from aurora_sgl.sidecar.frames import TRACE
from aurora_sgl.sidecar.refused import FILE, read
from aurora_sgl.sidecar.spool.log import Keep
from aurora_sgl.sidecar.traces.writer import TraceRow
from tests.integration.sidecar.test_sift import BOOT, STEP, Inside, changed
from tests.support import store_samples as samples

SMALL: dict[str, Any] = {"limit_bytes": 1 << 22, "segment_bytes": 1 << 13}
KEEPS: dict[str, Any] = {**SMALL, "keep": Keep(600.0, 1 << 21)}


class LaggingReplica:
    """A copy of the database as it was; a failover puts it in the database's place."""

    def __init__(self, engine: Engine, tmp_path: Path) -> None:
        self._url = engine.url
        self._copy = tmp_path / "replica.db"
        self._engine = engine

    def remember(self) -> None:
        if self._url.get_backend_name() == "sqlite":
            with closing(sqlite3.connect(str(self._url.database))) as connection:
                connection.execute("VACUUM INTO ?", (str(self._copy),))
        else:
            self._administer(
                f"CREATE DATABASE {self._url.database}_r TEMPLATE {self._url.database}"
            )

    def fail_over(self) -> None:
        """Nobody tells the sidecar: its connections break, and the next ones lead elsewhere."""
        if self._url.get_backend_name() == "sqlite":
            path = str(self._url.database)
            self._engine.dispose()
            for end in ("-wal", "-shm"):
                Path(path + end).unlink(missing_ok=True)
            os.replace(self._copy, path)
        else:
            self._administer(
                f"DROP DATABASE {self._url.database} WITH (FORCE)",
                f"ALTER DATABASE {self._url.database}_r RENAME TO {self._url.database}",
            )

    def _administer(self, *statements: str) -> None:
        self._engine.dispose()
        admin = create_engine(self._url.set(database="postgres"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
                ),
                {"name": self._url.database},
            )
            for statement in statements:
                connection.execute(text(statement))
        admin.dispose()


@pytest.fixture
def replica(engine: Engine, tmp_path: Path) -> LaggingReplica:
    return LaggingReplica(engine, tmp_path)


@pytest.fixture
def keeps(tmp_path: Path, engine: Engine) -> Iterator[Inside]:
    one = Inside(tmp_path / "0", engine, **KEEPS)
    yield one
    one.close()


def send_steps(inside: Inside, first: int, count: int, number: int = 1) -> None:
    for step in range(first, first + count):
        inside.send(samples.chain_step(number, step, step % 4))


def is_whole(inside: Inside, steps: int) -> None:
    """So many steps of one request are there, each once, wherever they are counted."""
    assert inside.count("acceptance_event") == steps
    assert inside.rows("SELECT sum(verify_steps) AS n FROM acceptance_minute") == [{"n": steps}]
    assert inside.rows("SELECT sum(verify_steps) AS n FROM request") == [{"n": steps}]
    assert inside.rows("SELECT max(last_seq) AS n FROM spool_watermark") == [{"n": inside.seq}]


def drained(inside: Inside) -> None:
    """A connection that broke costs a round."""
    assert inside.batcher.drain() or inside.batcher.drain()


def test_a_failover_to_a_replica_500_steps_behind_loses_no_row_and_stores_none_twice(
    keeps: Inside, replica: LaggingReplica
) -> None:
    """cases.md: PostgreSQL fails over to a replica that is 500 steps behind."""
    keeps.send(samples.hello(), samples.started(1))
    send_steps(keeps, 0, 100)
    drained(keeps)
    replica.remember()
    send_steps(keeps, 100, 250)
    keeps.send(changed(STEP, at_us=1 << 62, step=9999))
    send_steps(keeps, 350, 250)
    drained(keeps)
    is_whole(keeps, 600)
    assert keeps.spool.tail.segment > 5 and keeps.spool.kept_bytes
    replica.fail_over()
    send_steps(keeps, 600, 10)
    drained(keeps)
    is_whole(keeps, 610)
    assert keeps.batcher.watermarks.rewinds == 1
    assert keeps.drops() == {"rejected": 1}
    assert len(list(read(keeps.spool.folder / FILE))) == 1
    assert keeps.batcher.counts["set_aside"] == 1
    send_steps(keeps, 610, 5)
    drained(keeps)
    is_whole(keeps, 615)


def test_a_failover_is_seen_without_a_new_record_and_by_a_sidecar_that_starts_after_it(
    keeps: Inside, replica: LaggingReplica, tmp_path: Path
) -> None:
    keeps.send(samples.hello(), samples.started(1))
    send_steps(keeps, 0, 20)
    drained(keeps)
    replica.remember()
    send_steps(keeps, 20, 100)
    drained(keeps)
    replica.fail_over()
    keeps.close()
    again = Inside(tmp_path / "0", keeps.engine, **KEEPS)
    again.seq = keeps.seq
    with again.link.session(write=False) as s:  # as the control loop asks for what should be live
        s.execute(text("SELECT 1"))
    again.batcher.watermarks.compare()
    drained(again)
    is_whole(again, 120)
    assert again.drops() == {}
    keeps.spool, keeps.link = again.spool, again.link


def test_a_server_that_the_replica_has_never_heard_of_is_there_again_with_all_its_rows(
    keeps: Inside, replica: LaggingReplica
) -> None:
    replica.remember()
    keeps.send(samples.hello(), samples.started(1))
    send_steps(keeps, 0, 50)
    drained(keeps)
    replica.fail_over()
    send_steps(keeps, 50, 5)
    for _ in range(4):
        if keeps.batcher.drain():
            break
    is_whole(keeps, 55)
    assert keeps.drops() == {}


def test_what_the_store_forgot_and_the_spool_has_no_longer_is_counted(
    tmp_path: Path, engine: Engine, replica: LaggingReplica
) -> None:
    inside = Inside(tmp_path / "0", engine, **SMALL)  # keeps nothing of what was stored
    inside.send(samples.hello(), samples.started(1))
    send_steps(inside, 0, 99)
    drained(inside)
    replica.remember()
    for step in range(99, 400):
        inside.send(samples.chain_step(1, step, 1), samples.started(1000 + step))
        if step % 20 == 0:
            drained(inside)
    drained(inside)
    gone = inside.spool.start.segment - 1
    assert gone > 3
    replica.fail_over()
    inside.send(samples.chain_step(1, 400, 1))
    drained(inside)
    events = inside.count("acceptance_event")
    lost = inside.drops()["store"]
    # Every envelope of those held two records; of an average envelope the spool knows a bit less.
    assert 0 < 401 - events < 301
    assert abs(lost - 2 * (401 - events)) <= 0.3 * lost
    inside.close()


@pytest.mark.parametrize("gone", ["the folder", "the cursor"])
def test_a_spool_or_a_cursor_that_is_gone_counts_nothing_as_lost_that_was_not(
    tmp_path: Path, engine: Engine, gone: str
) -> None:
    """cases.md: 3,002 "lost" when nothing was (spool folder gone)."""
    inside = Inside(tmp_path / "0", engine)
    inside.send(samples.hello(), samples.started(1))
    send_steps(inside, 0, 300)
    lost = inside.envelope(samples.chain_step(1, 300, 1), samples.chain_step(1, 301, 1))
    assert lost
    inside.send(changed(STEP, at_us=1 << 62, step=9999))
    drained(inside)
    assert inside.drops() == {"transport": 2, "rejected": 1}
    inside.close()
    if gone == "the folder":
        shutil.rmtree(tmp_path / "0")
    else:
        (tmp_path / "0" / "cursor").unlink()
    again = Inside(tmp_path / "0", engine)
    again.seq, again.sent = inside.seq, inside.sent
    again.send(samples.hello())
    again.send(samples.chain_step(1, 302, 1))
    drained(again)
    assert again.drops() == {"transport": 2, "rejected": 1}
    assert again.count("acceptance_event") == 301
    again.envelope(*(samples.chain_step(1, step, 1) for step in range(303, 306)))  # never comes
    again.send(samples.chain_step(1, 306, 1))
    drained(again)
    assert again.drops() == {"transport": 5, "rejected": 1}  # on top of what there was
    again.close()


def test_what_is_lost_is_counted_in_records_however_many_an_envelope_holds(
    tmp_path: Path, engine: Engine
) -> None:
    """cases.md: drop_count, envelopes and records added up."""
    inside = Inside(tmp_path / "0", engine, limit_bytes=1 << 16)
    inside.send(samples.hello(), samples.started(1))
    inside.envelope(*(samples.chain_step(1, step, 1) for step in range(7)))  # on the way
    inside.send(samples.chain_step(1, 7, 1))
    drained(inside)
    assert inside.drops() == {"transport": 7}
    inside.write("ALTER TABLE request RENAME TO elsewhere")
    step = 8
    while not inside.intake.lost[BOOT]:  # the spool and the memory beside it fill
        inside.send(samples.chain_step(1, step, 1), samples.chain_step(1, step + 1, 1))
        step += 2
    for _ in range(9):
        inside.send(samples.chain_step(1, step, 1), samples.chain_step(1, step + 1, 1))
        step += 2
    assert inside.intake.lost[BOOT] == 20  # is said at once, while the store is away
    inside.write("ALTER TABLE elsewhere RENAME TO request")
    drained(inside)
    inside.send(samples.chain_step(1, step, 1))
    drained(inside)
    assert inside.drops() == {"transport": 7, "spool": 20}
    assert inside.count("acceptance_event") == step - 7 - 20 + 1
    inside.close()


def test_an_engine_that_does_not_number_its_records_is_counted_by_envelopes(
    tmp_path: Path, engine: Engine
) -> None:
    inside = Inside(tmp_path / "0", engine)
    for seq, record in ((1, samples.hello()), (4, samples.started(1)), (5, samples.started(2))):
        inside.intake.take(wire.encode(wire.Envelope(BOOT, seq, [record])))
    drained(inside)
    assert inside.drops() == {"transport": 2}
    inside.close()


def test_traces_come_back_with_their_requests_but_not_those_whose_files_went_since(
    keeps: Inside, replica: LaggingReplica
) -> None:
    replica.remember()
    keeps.send(samples.hello(), *(samples.started(n) for n in range(1, 4)))
    folder = keeps.spool.folder / "artifacts" / "traces"
    folder.mkdir(parents=True)
    for number in range(1, 4):
        (folder / str(number)).write_bytes(b"x" * 10)
        row = TraceRow(
            request_id=wire.request_id(BOOT, number), uri=f"traces/{number}", bytes=10,
            sha256="", created_us=samples.START_US, start=0, end=3, output_start=1,
            prompt_sha256="", head_sha256="", greedy=True, aux_width=6, last_width=2,
            dtype="float32",
        )  # fmt: skip
        keeps.spool.append(TRACE, msgspec.msgpack.encode(row))
    drained(keeps)
    assert keeps.count("trace") == 3
    (folder / "2").unlink()
    replica.fail_over()
    keeps.send(samples.started(4))
    for _ in range(4):
        if keeps.batcher.drain():
            break
    assert [row["uri"] for row in keeps.rows("SELECT uri FROM trace ORDER BY uri")] == [
        "traces/1",
        "traces/3",
    ]
    assert keeps.count("request", "traced") == 2
