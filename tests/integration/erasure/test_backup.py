"""``db backup`` and ``db restore``, on both databases."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, inspect, text

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.backup import MANIFEST, back_up, restore
from aurora_sgl.clock import utc_now
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.erasure import purge
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout.promote import promote
from aurora_sgl.rollout.versions import fetch_verified, import_version
from aurora_sgl.store import queries
from aurora_sgl.store.backup import dump, load
from aurora_sgl.store.purge import Selector
from tests.support import leftovers
from tests.support.drafter_cases import target_folder
from tests.support.purge_house import DOMAIN, RID, TALK, PurgeHouse


@pytest.fixture(autouse=True)
def postgres_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """pgserver brings the tools of its own release; the machine's may be older."""
    import pgserver

    tools = Path(pgserver.__file__).parent / "pginstall" / "bin"
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafter")
    target = target_folder(folder / "target")
    return checkpoint.save(scratch.make(target, draft_vocab_size=40, seed=1), folder / "drafter")


@pytest.fixture
def house(tmp_path: Path, engine: Engine, drafter: Path) -> Iterator[PurgeHouse]:
    """A store with everything, and a version with weights that is live."""
    one = PurgeHouse(tmp_path / "home", engine)
    one.fill()
    assert one.batcher.drain()
    with engine.begin() as connection:  # those of the others have no weights
        connection.execute(text("UPDATE drafter_version SET pruned_at = created_at"))
    one.version = import_version(engine, one.artifacts, drafter, "default")  # type: ignore[attr-defined]
    promote(engine, one.version.id, actor="ada", reason="first")  # type: ignore[attr-defined]
    yield one
    one.close_sidecar()


def rows(engine: Engine) -> dict[str, list[str]]:
    """Every row of every table, as text."""
    with store.reading(engine) as connection:
        return {
            table: sorted(
                str({k: bytes(v) if isinstance(v, memoryview) else v for k, v in row.items()})
                for row in connection.execute(text(f'SELECT * FROM "{table}"')).mappings()
            )
            for table in inspect(connection).get_table_names()
        }


@pytest.fixture
def elsewhere(engine: Engine, empty_url: str) -> Iterator[Engine]:
    other = store.connect(empty_url)
    yield other
    other.dispose()


@pytest.fixture
def empty_url(engine: Engine, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Another empty database of the same kind."""
    if engine.dialect.name == "sqlite":
        return f"sqlite:///{tmp_path / 'elsewhere' / 'aurora.db'}"
    return str(request.getfixturevalue("postgres_database"))


def test_after_a_restore_every_row_is_there_and_a_servers_drafter_loads(
    house: PurgeHouse, elsewhere: Engine, tmp_path: Path
) -> None:
    report = back_up(house.engine, house.artifacts, tmp_path / "backup")
    assert (report.traces, report.versions, report.traces_gone) == (4, 1, 0)
    assert report.versions_without_weights == []
    there = ArtifactRoot(str(tmp_path / "elsewhere" / "artifacts"))
    restored = restore(elsewhere, there, tmp_path / "backup", tmp_path / "elsewhere")
    assert restored.purged_again == 0
    before = rows(house.engine)
    assert sum(map(len, before.values())) > 40
    for table in ("retention_limit", "prune_run", "store_key", "spool_watermark", "lease"):
        assert before[table], table
    assert rows(elsewhere) == before
    with store.session(elsewhere, write=False) as s:
        live = queries.aliases.desired_version(s, queries.groups.group_by_name(s, "default").id)
        assert live is not None
        version = queries.versions.version(s, live[0])
        traces = queries.traces.traces_oldest_first(s)
    assert all(there.exists(trace.uri) for trace in traces) and len(traces) == 4
    checkpoint.load(fetch_verified(there, version, tmp_path / "loaded"))
    for folder in (tmp_path / "backup", tmp_path / "elsewhere"):
        for path in (folder, *folder.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path
    assert house.batcher.drain()  # history is as protected as before, and the store takes rows
    with pytest.raises(Exception, match="append-only"), elsewhere.begin() as connection:
        connection.execute(text("DELETE FROM deployment"))
    with store.session(elsewhere) as s:
        queries.runs.start_run(s, live[0] and version.group_id, trigger="after")


def test_a_store_with_rows_is_replaced_only_when_told_to(house: PurgeHouse, tmp_path: Path) -> None:
    back_up(house.engine, house.artifacts, tmp_path / "backup")
    before = rows(house.engine)
    with store.session(house.engine) as s:
        queries.groups.ensure_group(s, "later", "target", "", "LlamaForCausalLMEagle3")
    with pytest.raises(AuroraError, match=r"the store is not empty.*--force"):
        restore(house.engine, house.artifacts, tmp_path / "backup", house.home)
    assert len(rows(house.engine)["deployment_group"]) == 2
    restore(house.engine, house.artifacts, tmp_path / "backup", house.home, force=True)
    assert rows(house.engine) == before


WAYS = [("rid", RID, "sqlite"), ("rid", RID, "postgresql"), ("conversation", TALK, "sqlite"),
        ("domain", DOMAIN, "sqlite")]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "engine"), WAYS, indirect=["engine"])
def test_what_was_purged_after_the_backup_does_not_come_back_with_it(
    house: PurgeHouse, tmp_path: Path, kind: str, value: str
) -> None:
    back_up(house.engine, house.artifacts, tmp_path / "backup")
    house.close_sidecar()
    purge(
        house.engine, house.artifacts, house.home, Selector(kind, value, utc_now()),
        actor="ada", reason="asked to",
    )  # fmt: skip
    report = restore(house.engine, house.artifacts, tmp_path / "backup", house.home, force=True)
    assert report.purged_again == 2
    assert house.leftovers() == set()
    if kind == "domain":
        assert leftovers.in_tables(house.engine, {DOMAIN: DOMAIN.encode()}) == set()
    assert house.numbers("request", "id") == [3, 4]
    house.open_sidecar(house.home / "spool" / "0")
    purge(
        house.engine, house.artifacts, house.home, Selector("rid", "another", utc_now()),
        actor="ada", reason="the next number is free", wait_seconds=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_the_key_of_hashes_stays_when_a_backup_has_none(house: PurgeHouse, tmp_path: Path) -> None:
    """One of a release before there was a key: rules of purges name conversations by it."""
    dumped, _ = dump(house.engine, tmp_path)
    with closing(sqlite3.connect(tmp_path / dumped.file, isolation_level=None)) as copy:
        copy.execute("DELETE FROM store_key")
    key = rows(house.engine)["store_key"]
    load(house.engine, dumped, tmp_path, force=True)
    assert rows(house.engine)["store_key"] == key != []


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_options_of_the_url_that_only_the_driver_knows_do_not_reach_the_tools(
    house: PurgeHouse, tmp_path: Path
) -> None:
    url = house.engine.url.update_query_dict({"prepare_threshold": "5", "connect_timeout": "7"})
    other = store.connect(url.render_as_string(hide_password=False))
    assert back_up(other, house.artifacts, tmp_path / "backup").traces == 4
    other.dispose()


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_a_damaged_or_foreign_backup_changes_nothing(house: PurgeHouse, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    back_up(house.engine, house.artifacts, folder)
    before = rows(house.engine)

    def refused(message: str) -> None:
        with pytest.raises(AuroraError, match=message) as refusal:
            restore(house.engine, house.artifacts, folder, house.home, force=True)
        assert "\n" not in str(refusal.value)
        assert rows(house.engine) == before

    manifest = json.loads((folder / MANIFEST).read_text())
    trace = next(path for path in folder.rglob("*.safetensors") if "traces" in str(path))
    sound = trace.read_bytes()
    trace.write_bytes(sound[:-1] + b"?")
    refused("is damaged: artifacts/traces/.* is missing or was changed")
    trace.write_bytes(sound)

    def claim(**fields: Any) -> None:
        changed = {**manifest, "store": {**manifest["store"], **fields}}
        (folder / MANIFEST).write_text(json.dumps(changed))

    claim(database="oracle")
    refused("the backup is one of oracle, the store runs on")
    claim(revision="9999")
    refused("9999, which this release does not know")
    (folder / MANIFEST).write_text("{}")
    refused("is no whole backup")
    (folder / MANIFEST).unlink()
    refused("is no whole backup")
    with pytest.raises(AuroraError, match="is not empty; choose another folder"):
        back_up(house.engine, house.artifacts, folder)


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_a_trace_that_went_meanwhile_is_counted_and_missing_weights_are_named(
    house: PurgeHouse, elsewhere: Engine, tmp_path: Path
) -> None:
    with store.session(house.engine, write=False) as s:
        trace = queries.traces.traces_oldest_first(s)[0]
    house.artifacts.delete(trace.uri)
    version = house.version  # type: ignore[attr-defined]
    house.artifacts.delete(version.weights_uri)
    report = back_up(house.engine, house.artifacts, tmp_path / "backup")
    assert (report.traces, report.traces_gone) == (3, 1)
    assert report.versions_without_weights == [version.id]
    there = ArtifactRoot(str(tmp_path / "elsewhere" / "artifacts"))
    restore(elsewhere, there, tmp_path / "backup", tmp_path / "elsewhere")
    with store.session(elsewhere, write=False) as s:
        assert len(queries.traces.traces_oldest_first(s)) == 3  # no row without its file


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_without_postgresqls_tools_a_backup_says_which_in_one_line(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("aurora_sgl.store.backup._FOLDERS", ())
    artifacts = ArtifactRoot(str(tmp_path / "artifacts"))
    with pytest.raises(
        AuroraError, match=r"pg_dump of PostgreSQL \d+ or newer .*postgresql-client"
    ):
        back_up(engine, artifacts, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_other_tables_of_the_schema_are_neither_copied_nor_dropped(
    engine: Engine, tmp_path: Path
) -> None:
    def write(statement: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(statement))

    artifacts = ArtifactRoot(str(tmp_path / "artifacts"))
    write('CREATE TABLE "Their Table" (n int)')
    write('INSERT INTO "Their Table" VALUES (1)')
    back_up(engine, artifacts, tmp_path / "backup")
    write('INSERT INTO "Their Table" VALUES (2)')
    restore(engine, artifacts, tmp_path / "backup", tmp_path, force=True)
    with store.reading(engine) as connection:
        assert connection.scalar(text('SELECT count(*) FROM "Their Table"')) == 2
