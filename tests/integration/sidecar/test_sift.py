"""What reaches the store when it refuses something: all but what is to blame."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from aurora_sgl import cli, store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import get_settings
from aurora_sgl.sidecar import retry, servers
from aurora_sgl.sidecar.batcher import Batcher, Intake
from aurora_sgl.sidecar.frames import TRACE
from aurora_sgl.sidecar.refused import FILE, RefusedFile, RefusedRecord, read
from aurora_sgl.sidecar.servers import Registry
from aurora_sgl.sidecar.spool.bypass import Bypass
from aurora_sgl.sidecar.spool.cursor import Cursor
from aurora_sgl.sidecar.spool.log import Spool
from aurora_sgl.sidecar.spool.slots import adopt
from aurora_sgl.sidecar.traces.budget import TraceStore
from aurora_sgl.sidecar.traces.writer import TraceRow
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreLink
from tests.support import store_samples as samples

BOOT = samples.BOOT


class Inside:
    """The parts of a sidecar between its socket and the store."""

    def __init__(self, folder: Path, engine: Engine, group: str = "default", **spool: Any) -> None:
        url = engine.url.render_as_string(hide_password=False)
        self.engine = engine
        self.spool = Spool(folder, **{"limit_bytes": 1 << 26, **spool})
        self.cursor = Cursor(self.spool)
        self.link = StoreLink(url, durable=True)
        self.registry = Registry(self.link, self.cursor, group)
        self.bypass = Bypass(self.spool)
        self.intake = Intake(self.spool, self.registry, self.bypass)
        traces = TraceStore(self.link, ArtifactRoot(str(folder / "artifacts")))
        self.traces = traces
        self.batcher = Batcher(
            self.spool, self.cursor, self.link, self.registry, traces, self.bypass
        )
        self.seq = 0
        self.sent: Counter[int] = Counter()  # records, by boot

    def send(self, *records: wire.Record, boot_id: int = BOOT, seq: int = 0) -> None:
        self.intake.take(self.envelope(*records, boot_id=boot_id, seq=seq))

    def envelope(self, *records: wire.Record, boot_id: int = BOOT, seq: int = 0) -> bytes:
        """The next one, which may get lost."""
        self.seq = seq or self.seq + 1
        envelope = wire.Envelope(boot_id, self.seq, list(records), self.sent[boot_id])
        self.sent[boot_id] += len(records)
        return wire.encode(envelope)

    def drops(self) -> dict[str, int]:
        return {row["place"]: row["count"] for row in self.rows("SELECT * FROM drop_count")}

    def rows(self, query: str) -> list[dict[str, Any]]:
        with store.reading(self.engine) as connection:
            return [dict(row) for row in connection.execute(text(query)).mappings()]

    def count(self, table: str, where: str = "true") -> int:
        return int(self.rows(f"SELECT count(*) AS n FROM {table} WHERE {where}")[0]["n"])

    def write(self, *statements: str) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def close(self) -> None:
        self.link.close()
        self.spool.close()


@pytest.fixture
def inside(tmp_path: Path, engine: Engine) -> Iterator[Inside]:
    one = Inside(tmp_path / "0", engine)
    yield one
    one.close()


def changed(record: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(record, **fields)


STEP, START = samples.chain_step(1, 1, 1), samples.started(2)
END = samples.finished(1, [])


@pytest.mark.parametrize(
    "bad",
    [
        changed(STEP, draft_tokens=[1 << 40, 1, 2]),
        changed(STEP, at_us=1 << 62),
        changed(STEP, swap_age=1 << 64 - 1),
        changed(STEP, request_id=wire.request_id(BOOT + 1, 1)),
        changed(START, prompt_tokens=1 << 63),
        changed(START, at_us=-(1 << 62)),
        changed(END, status="odd"),
        changed(END, retractions=1 << 63),
        wire.SwapDone(BOOT, 1 << 62, 3, True, "", "", 1.0, 1.0),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_that_no_column_takes_is_set_aside_and_takes_no_other_with_it(
    inside: Inside, bad: wire.Record
) -> None:
    inside.send(samples.hello(), samples.started(1))
    inside.send(samples.chain_step(1, 0, 1), bad, samples.chain_step(1, 2, 1))
    inside.send(samples.chain_step(1, 3, 1))
    assert inside.batcher.drain()
    steps = [row["step"] for row in inside.rows("SELECT step FROM acceptance_event ORDER BY step")]
    assert steps == [0, 2, 3]
    assert inside.rows("SELECT place, count FROM drop_count") == [{"place": "rejected", "count": 1}]
    assert inside.rows("SELECT last_seq FROM spool_watermark") == [{"last_seq": 3}]
    (kept,) = read(inside.spool.folder / FILE)
    assert (kept.boot_id, kept.seq, kept.record) == (BOOT, 2, bad)
    line = json.loads((inside.spool.folder / FILE).read_text())
    assert line["why"] == kept.why and line["why"].endswith(")")  # in words, and what was said
    assert inside.batcher.trouble == "" and inside.batcher.oldest_seconds == 0.0


def test_what_was_set_aside_can_be_stored_by_a_command_once_its_rule_is_gone(
    inside: Inside,
) -> None:
    inside.write("CREATE UNIQUE INDEX mine ON request (prompt_tokens)")
    starts = [changed(samples.started(n), prompt_tokens=10 + n % 5) for n in range(2, 8)]
    inside.send(samples.hello(), *starts)
    inside.send(changed(STEP, at_us=1 << 62))  # which no store will ever take
    assert inside.batcher.drain()
    assert inside.count("request") == 5
    assert inside.drops() == {"rejected": 2}
    folder = inside.spool.folder
    groups = retry.refused_groups(folder)
    assert sorted((one.kind, one.records) for one in groups) == [("start", 1), ("step", 1)]
    assert retry.retry(inside.engine, folder) == {"refused": 2}  # the rule is still there
    inside.write("DROP INDEX mine")
    inside.send(samples.started(9))  # the sidecar goes on meanwhile
    assert inside.batcher.drain()
    assert retry.retry(inside.engine, folder) == {"stored": 1, "refused": 1}
    assert inside.count("request") == 7
    (left,) = read(folder / FILE)
    assert left.record == changed(STEP, at_us=1 << 62)
    with store.session(inside.engine, write=False) as s:
        group = queries.groups.group_by_name(s, "default").id
        assert queries.drops.drops(s, group) == {"rejected": 1}
    assert retry.retry(inside.engine, folder) == {"refused": 1}


def test_a_retry_that_was_killed_is_gone_on_with(inside: Inside) -> None:
    inside.send(samples.hello(), samples.started(1))
    assert inside.batcher.drain()
    folder = inside.spool.folder
    one, two = (RefusedRecord(BOOT, 1, samples.started(n), "why") for n in (2, 3))
    RefusedFile(folder).keep([one])
    (folder / FILE).rename(folder / retry.MOVED)
    RefusedFile(folder).keep([two])
    assert retry.folders(folder.parent.parent) == []  # not a spool of a data folder
    assert [row.records for row in retry.refused_groups(folder)] == [2]
    assert retry.retry(inside.engine, folder) == {"stored": 2}
    assert inside.count("request") == 3
    assert not (folder / retry.MOVED).exists() and not (folder / FILE).exists()


def test_a_record_of_a_server_in_another_group_or_in_none_stays_set_aside(inside: Inside) -> None:
    inside.send(samples.hello(), samples.started(1))
    assert inside.batcher.drain()
    other = samples.hello(BOOT + 1, "other:1")
    other.server["target_model"] = "another target"
    inside.send(other, samples.started(1, boot_id=BOOT + 1), boot_id=BOOT + 1, seq=1)
    assert inside.batcher.drain()
    RefusedFile(inside.spool.folder).keep([RefusedRecord(5, 1, samples.started(1, boot_id=5), "?")])
    assert retry.retry(inside.engine, inside.spool.folder) == {"refused": 3}
    assert inside.count("request") == 1
    assert {one.why for one in read(inside.spool.folder / FILE)} >= {retry.NO_SERVER}


@pytest.fixture
def home(tmp_path: Path, upgraded_sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder with a store, which this process takes for its own."""
    home = tmp_path / "home"
    (home / "spool" / "0").mkdir(parents=True)
    (home / "aurora.db").write_bytes(upgraded_sqlite.read_bytes())
    monkeypatch.setenv("AURORA_HOME", str(home))
    get_settings.cache_clear()
    yield home
    get_settings.cache_clear()


def test_the_command_shows_what_was_refused_and_tries_it_again(home: Path) -> None:
    engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "")
        queries.servers.register_server(s, group.id, samples.hello())
    refused = [RefusedRecord(BOOT, 1, samples.started(n), "a table is gone") for n in (1, 2)]
    RefusedFile(home / "spool" / "0").keep(refused)
    runner = CliRunner()
    shown = runner.invoke(cli.app, ["db", "refused", "--json"])
    (row,) = json.loads(shown.output)
    assert (row["why"], row["kind"], row["records"]) == ("a table is gone", "start", 2)
    done = runner.invoke(cli.app, ["db", "refused", "--retry", "--json"])
    assert done.exit_code == 0, done.output
    assert [row["stored"] for row in json.loads(done.output)] == [2]
    assert json.loads(runner.invoke(cli.app, ["db", "refused", "--json"]).output) == []
    with store.reading(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM request")) == 2
    engine.dispose()


BREAKS = {
    "a table is away": (
        "ALTER TABLE acceptance_minute RENAME TO elsewhere",
        "ALTER TABLE elsewhere RENAME TO acceptance_minute",
        "missing or was changed",
    ),
    "a column is away": (
        "ALTER TABLE request RENAME COLUMN domain TO subject",
        "ALTER TABLE request RENAME COLUMN subject TO domain",
        "missing or was changed",
    ),
}
BREAKS_OF_POSTGRES = {
    "a rule that nothing keeps": (
        "ALTER TABLE acceptance_event ADD CONSTRAINT mine CHECK (step < 0) NOT VALID",
        "ALTER TABLE acceptance_event DROP CONSTRAINT mine",
        "a rule of the table is broken",
    ),
    "a column of another type": (
        "DROP VIEW v_acceptance_event, v_rejected_tokens CASCADE; "
        "ALTER TABLE acceptance_event ALTER COLUMN swap_age TYPE smallint",
        "ALTER TABLE acceptance_event ALTER COLUMN swap_age TYPE integer",
        "does not fit its column",
    ),
    "a column that must be given": (
        "ALTER TABLE request ADD COLUMN more integer NOT NULL DEFAULT 1; "
        "ALTER TABLE request ALTER COLUMN more DROP DEFAULT",
        "ALTER TABLE request DROP COLUMN more",
        "missing or was changed",
    ),
    "no partition for the day": (
        "ALTER TABLE acceptance_event DETACH PARTITION acceptance_event_default",
        "ALTER TABLE acceptance_event ATTACH PARTITION acceptance_event_default DEFAULT",
        "missing or was changed",
    ),
}


def test_what_somebody_can_mend_waits_whole_and_is_stored_once_when_it_is_mended(
    inside: Inside,
) -> None:
    breaks = dict(BREAKS)
    if inside.engine.dialect.name == "postgresql":
        breaks |= BREAKS_OF_POSTGRES
    inside.send(samples.hello(), samples.started(1))
    step = 0
    for broken, mended, words in breaks.values():
        assert inside.batcher.drain()
        inside.write(broken)
        for _ in range(5):  # of a day that has no partition of its own, each
            inside.send(samples.chain_step(1, step, 1, at_us=1_000_000 + step))
            inside.send(samples.started(100 + step))
            step += 1
        for _ in range(2):
            assert not inside.batcher.drain()
            assert words in inside.batcher.trouble
        inside.write(mended)
        assert inside.batcher.drain()
        assert inside.batcher.trouble == ""
        assert inside.count("acceptance_event") == step
    assert inside.count("request") == 1 + step
    assert inside.rows("SELECT verify_steps FROM request WHERE verify_steps > 0") == [
        {"verify_steps": step}
    ]
    assert inside.count("drop_count") == 0
    assert not (inside.spool.folder / FILE).exists()


def test_a_deleted_server_is_made_again_and_nothing_of_it_is_lost(inside: Inside) -> None:
    inside.send(samples.hello(), samples.started(1), samples.chain_step(1, 0, 1))
    inside.send(samples.hello(BOOT + 1, "other:1"), boot_id=BOOT + 1, seq=1)
    assert inside.batcher.drain()
    for how in ("with all that names it", "alone"):
        if how == "with all that names it":
            inside.write(*(f"DELETE FROM {t}" for t in ("request", "spool_watermark", "server")))
            kept = 0
        elif inside.engine.dialect.name == "sqlite":
            with inside.engine.connect() as connection:
                connection.exec_driver_sql("ROLLBACK")
                connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
                connection.exec_driver_sql("DELETE FROM server")
                connection.exec_driver_sql("PRAGMA foreign_keys = ON")
            kept = 1
        else:
            continue
        number = 2 + kept
        inside.send(samples.started(number), samples.chain_step(number, 0, 2))
        assert not inside.batcher.drain()
        assert "gone" in inside.batcher.trouble or "registered" in inside.batcher.trouble
        assert inside.batcher.drain()
        (server,) = inside.rows("SELECT id, boot_id FROM server")
        assert server["boot_id"] == BOOT
        assert inside.count("request", f"server_id = {server['id']}") == 1 + kept
        assert inside.count("acceptance_event") == number
    assert not (inside.spool.folder / FILE).exists()


def unidentified(boot_id: int, sha256: str = "") -> wire.Hello:
    hello = samples.hello(boot_id, "test:1")
    hello.server.update(drafter_path="somewhere", live_sha256=sha256)
    return hello


def test_a_boot_that_was_never_identified_waits_for_itself_only(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = BOOT, BOOT + 1
    inside.send(unidentified(first), samples.started(1), samples.chain_step(1, 0, 1))
    assert not inside.batcher.drain()
    assert inside.batcher.trouble == servers.NOT_IDENTIFIED
    # It was started again, without a drafter to import; the first one is over.
    monkeypatch.setattr(servers, "STALE_SECONDS", 0.0)
    inside.send(samples.hello(last, "test:1"), boot_id=last, seq=1)
    inside.send(samples.started(1, boot_id=last), boot_id=last, seq=2)
    inside.send(samples.chain_step(1, 0, 1, boot_id=last, version_id=9), boot_id=last, seq=3)
    assert inside.batcher.drain()
    found = inside.rows(
        "SELECT request_id, drafter_version_id AS v FROM acceptance_event ORDER BY 1"
    )
    assert found == [
        {"request_id": wire.request_id(first, 1), "v": 0},
        {"request_id": wire.request_id(last, 1), "v": 9},
    ]
    assert inside.count("drop_count") == 0


@pytest.mark.parametrize("same", [True, False])
def test_the_drafter_of_a_boot_that_is_over_is_found_when_the_next_one_has_the_same(
    inside: Inside, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = BOOT, BOOT + 1
    monkeypatch.setattr(servers, "STALE_SECONDS", 0.0)
    inside.send(unidentified(first, "a" * 64), samples.chain_step(1, 0, 1))
    inside.send(unidentified(last, "a" * 64 if same else "b" * 64), boot_id=last, seq=1)
    assert not inside.batcher.drain()  # the drafter may be the one that is being imported
    with store.session(inside.engine) as s:
        group = queries.groups.group_by_name(s, "default").id
        version = samples.add_version(s, group, "a" if same else "b")
    registration = inside.registry.registration(last)
    assert registration is not None
    registration.boot_version_id = version
    assert inside.batcher.drain()
    (event,) = inside.rows("SELECT drafter_version_id AS v FROM acceptance_event")
    assert event["v"] == (version if same else 0)


def test_a_boot_whose_successor_can_not_be_identified_either_does_not_wait_for_ever(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "STALE_SECONDS", 0.0)
    monkeypatch.setattr(servers, "GRACE_SECONDS", 0.1)
    inside.send(unidentified(BOOT), samples.chain_step(1, 0, 1))
    inside.send(unidentified(BOOT + 1), boot_id=BOOT + 1, seq=1)
    time.sleep(0.15)
    assert not inside.batcher.drain()
    assert inside.count("acceptance_event") == 1
    assert inside.batcher.trouble == servers.NOT_IDENTIFIED  # the second one, for itself


def test_records_of_a_boot_that_never_said_who_it_is_are_set_aside_once_it_is_over(
    inside: Inside,
) -> None:
    inside.send(samples.started(1, boot_id=5), samples.chain_step(1, 0, 1, boot_id=5), boot_id=5)
    assert not inside.batcher.drain()
    inside.send(samples.hello(), samples.started(1), seq=1)
    assert inside.batcher.drain()
    assert inside.count("request") == 1
    assert {(one.boot_id, type(one.record)) for one in read(inside.spool.folder / FILE)} == {
        (5, wire.RequestStarted),
        (5, wire.VerifyStep),
    }


def test_a_boot_stays_in_its_group_when_the_next_one_is_started_in_another(
    inside: Inside, tmp_path: Path
) -> None:
    inside.send(samples.hello(), samples.started(1))
    assert inside.batcher.drain()
    inside.send(samples.started(2))
    inside.close()
    again = Inside(tmp_path / "0", inside.engine, group="other")
    hello = samples.hello(BOOT + 1)
    hello.server["target_model"] = "another target"
    again.send(hello, boot_id=BOOT + 1, seq=1)
    again.send(samples.started(1, boot_id=BOOT + 1), boot_id=BOOT + 1, seq=2)
    assert again.batcher.drain()
    query = "SELECT g.name FROM request r JOIN server s ON s.id = r.server_id \
JOIN deployment_group g ON g.id = s.group_id ORDER BY r.id"
    assert [row["name"] for row in again.rows(query)] == ["default", "default", "other"]
    inside.link, inside.spool = again.link, again.spool


def test_what_this_release_can_not_read_is_set_aside_and_the_rest_goes_on(inside: Inside) -> None:
    inside.send(samples.hello(), samples.started(1))
    step = msgspec.msgpack.encode(samples.chain_step(1, 0, 1))
    of_tomorrow = msgspec.msgpack.encode(["dream", 1, 2])
    raw = [BOOT, 2, [msgspec.Raw(of_tomorrow), msgspec.Raw(step)]]
    inside.intake.take(msgspec.msgpack.encode(raw))
    inside.spool.append(b"E", b"no envelope")
    inside.spool.append(TRACE, b"no trace")
    inside.send(samples.chain_step(1, 1, 1), seq=3)
    assert inside.batcher.drain()
    assert inside.count("acceptance_event") == 2
    lines = [json.loads(line) for line in (inside.spool.folder / FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["bytes"] * 3
    assert list(read(inside.spool.folder / FILE)) == []


def test_a_trace_that_the_store_refuses_takes_no_other_with_it(inside: Inside) -> None:
    inside.send(samples.hello(), *(samples.started(n) for n in range(1, 4)))

    def row(number: int, **fields: Any) -> bytes:
        values: dict[str, Any] = {
            "request_id": wire.request_id(BOOT, number), "uri": f"traces/{number}", "bytes": 10,
            "sha256": "", "created_us": samples.START_US, "start": 0, "end": 3, "output_start": 1,
            "prompt_sha256": "", "head_sha256": "", "greedy": True, "aux_width": 6,
            "last_width": 2, "dtype": "float32", **fields,
        }  # fmt: skip
        return msgspec.msgpack.encode(TraceRow(**values))

    for one in (row(1), row(2, bytes=1 << 63), row(99), row(3)):
        inside.spool.append(TRACE, one)
    assert inside.batcher.drain()
    found = inside.rows("SELECT uri FROM trace ORDER BY uri")
    assert [row["uri"] for row in found] == ["traces/1", "traces/3"]
    assert (inside.traces.counts["without_request"], inside.traces.counts["refused"]) == (1, 1)


def test_what_was_set_aside_outlives_the_sidecar_that_set_it_aside(tmp_path: Path) -> None:
    home = tmp_path / "home"
    engine = store.connect(f"sqlite:///{tmp_path / 'a.db'}")
    old = Inside(home / "spool" / "1", engine)
    old.send(samples.hello(), changed(STEP, at_us=1 << 62))
    assert old.batcher.drain()
    old.close()
    new = Spool(home / "spool" / "0", 1 << 20)
    adopt(home, new, Cursor(new))
    assert not (home / "spool" / "1").exists()
    (kept,) = read(new.folder / FILE)
    assert kept.record == changed(STEP, at_us=1 << 62)
    new.close()
    engine.dispose()


def test_the_age_of_the_oldest_record_is_told(inside: Inside) -> None:
    assert inside.batcher.oldest_seconds == 0.0
    inside.send(samples.hello(), samples.started(1))
    time.sleep(0.3)
    assert 0.2 < inside.batcher.oldest_seconds < 2.0
    assert inside.batcher.drain()
    assert inside.batcher.oldest_seconds == 0.0
    time.sleep(1.2)
    inside.send(samples.started(2))
    assert inside.batcher.oldest_seconds < 1.0
