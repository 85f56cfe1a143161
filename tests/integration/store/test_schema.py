"""Schema, views, triggers and connections, on both databases."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from aurora_sgl import store, wire
from aurora_sgl.errors import AuroraError
from aurora_sgl.intervals import Z95
from aurora_sgl.rollout import promote, switches
from aurora_sgl.store import queries
from aurora_sgl.store.events import PACKED_INTS
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.models import AcceptanceEvent, Base
from aurora_sgl.store.packing import pack_floats, unpack_ints
from aurora_sgl.store.schema import scripts_folder
from tests.support import store_samples as samples

VIEWS = {
    "v_accept_length_by_version": "drafter_version_id, mixed, depth, topk, accept_rule",
    "v_accept_length_by_domain_hour": "domain, hour, drafter_version_id",
    "v_rejected_tokens": "request_id, step, rank",
    "v_acceptance_event": "request_id, step",
    "v_deployment_history": "generation",
}


def fill(engine: Engine) -> None:
    """Traffic of two versions, a tree step, and two promotions."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        server_id = queries.servers.register_server(s, group.id, samples.hello()).id
        first, second = (samples.add_version(s, group.id, letter) for letter in "ab")
        queries.servers.touch_server(s, server_id, boot_version_id=first)
    batch = samples.traffic(requests=4, steps=12)
    later = samples.START_US + 2 * 3_600_000_000
    extra: list[wire.Record] = [
        samples.started(9, domain="extraction"),
        samples.tree_step(9, 0),
        samples.chain_step(9, 1, 2, version_id=second, at_us=later),
        samples.chain_step(9, 2, 0, depth=0, at_us=later),  # a plain step
    ]
    ingest(engine, server_id, samples.BOOT, [*batch, (99, extra)])
    promote(engine, first, actor="ada", reason="first")
    promote(engine, second, actor="ada", reason="better", evidence={"difference": 0.1})
    switches.turn(engine, "default", "learning", False, actor="ada", reason="a test")


def plain(value: Any) -> Any:
    """What a cell means, whatever the database calls it."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        return json.loads(value)
    if isinstance(value, str) and value[4:5] == "-" and value[13:14] == ":":
        return datetime.fromisoformat(value).replace(tzinfo=UTC)
    if isinstance(value, float):
        return round(value, 12)
    return value


def rows_of(engine: Engine, view: str) -> list[dict[str, Any]]:
    with store.reading(engine) as connection:
        result = connection.execute(text(f"SELECT * FROM {view} ORDER BY {VIEWS[view]}"))
        return [{name: plain(cell) for name, cell in row._mapping.items()} for row in result]


def test_both_databases_give_equal_rows_in_every_view(
    tmp_path: Path, postgres_database: str
) -> None:
    found = []
    for url in (f"sqlite:///{tmp_path / 'a.db'}", postgres_database):
        engine = store.connect(url)
        store.upgrade(engine)
        fill(engine)
        found.append({view: rows_of(engine, view) for view in VIEWS})
        engine.dispose()
    for rows in found[1]["v_deployment_history"] + found[0]["v_deployment_history"]:
        del rows["created_at"]
    for view in VIEWS:
        assert found[0][view] == found[1][view] != [], view


def test_the_views_say_what_was_served(engine: Engine) -> None:
    fill(engine)
    lengths = rows_of(engine, "v_accept_length_by_version")
    assert {row["drafter_version_id"] for row in lengths} == {1, 2}
    for row in lengths:
        assert row["accept_length"] == pytest.approx(1 + row["accepted"] / row["verify_steps"])
    chain = next(row for row in lengths if row["topk"] == 1 and row["requests"] == 4)
    with store.session(engine, write=False) as s:
        (exact,) = queries.accept_lengths.accept_length_by_version(
            s, 1, accept_rule="greedy", domains=["chat", "code"]
        )
    assert exact.ci_high is not None
    half = (exact.ci_high - exact.accept_length) / Z95
    assert chain["accept_length_variance"] == pytest.approx(half**2)
    hours = rows_of(engine, "v_accept_length_by_domain_hour")
    assert {row["hour"] for row in hours if row["domain"] == "extraction"} == {
        datetime(2026, 11, 18, 11, tzinfo=UTC),
        datetime(2026, 11, 18, 13, tzinfo=UTC),
    }
    history = rows_of(engine, "v_deployment_history")
    assert [(row["generation"], row["version_id"]) for row in history] == [(1, 1), (2, 2)]
    assert history[1]["evidence"] == {"difference": 0.1}


def test_the_json_view_decodes_the_packed_columns(engine: Engine) -> None:
    fill(engine)
    rows = rows_of(engine, "v_acceptance_event")
    with store.reading(engine) as connection:
        packed = {
            (row.request_id, row.step): row
            for row in connection.execute(AcceptanceEvent.__table__.select())
        }
    assert len(rows) == len(packed)
    for row in rows:
        event = packed[row["request_id"], row["step"]]
        for name in PACKED_INTS:
            assert row[name] == unpack_ints(getattr(event, name)), name
        assert row["accept_length"] == 1 + event.accepted
        assert row["draft_logprobs"] is None


def test_log_probabilities_are_decoded_to_their_float16_values(engine: Engine) -> None:
    fill(engine)
    values = [0.0, -0.5, -1.25, -17.6875, -0.00006103515625, 5.960464477539063e-08, -65504.0]
    with engine.begin() as connection:
        connection.execute(
            AcceptanceEvent.__table__.update()
            .where(AcceptanceEvent.step == 0)
            .values(draft_logprobs=pack_floats(values))
        )
    row = next(row for row in rows_of(engine, "v_acceptance_event") if row["step"] == 0)
    assert row["draft_logprobs"] == pytest.approx(values, abs=0, rel=1e-9)


def test_rejected_tokens_are_the_children_of_the_last_accepted_node(engine: Engine) -> None:
    fill(engine)
    rows = rows_of(engine, "v_rejected_tokens")
    tree = [row for row in rows if row["accept_rule"] == "target_sampling"]
    assert [(row["rank"], row["draft_token"], row["target_token"]) for row in tree] == [
        (1, 33, 49_151),
        (2, 44, 49_151),
    ]
    for row in rows:
        if row["accept_rule"] == "greedy":
            assert row["draft_token"] == 100 + row["first_rejected_at"] - 1
            assert row["target_token"] == 900 + row["step"]
            assert row["rank"] == 1


def test_the_migrations_make_the_tables_of_the_models(engine: Engine) -> None:
    def own(_: Any, name: str | None, kind: str, *rest: Any) -> bool:
        return not (kind in ("table", "index") and str(name).startswith(
            ("acceptance_event_", "ix_acceptance_event_")))  # fmt: skip

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_object": own})
        assert compare_metadata(context, Base.metadata) == []
        if engine.dialect.name == "sqlite":
            ddl = connection.scalar(
                text("SELECT sql FROM sqlite_master WHERE name = 'acceptance_event'")
            )
            assert "WITHOUT ROWID" in ddl
        keys = inspect(connection).get_pk_constraint("acceptance_event")["constrained_columns"]
    assert keys[:2] == ["request_id", "step"]


def test_the_schema_goes_down_to_nothing_and_up_again(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(scripts_folder()))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    with engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) <= {"alembic_version"}
    assert store.upgrade(engine) == store.current(engine) == store.head()


def test_two_processes_upgrade_an_empty_database_at_once(empty_store_url: str) -> None:
    code = (
        "import sys; from aurora_sgl import store; print(store.upgrade(store.connect(sys.argv[1])))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, empty_store_url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        for _ in range(3)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, store.head()), err


def test_code_older_than_the_database_says_so_and_changes_nothing(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for refused in (store.upgrade, store.require_current):
        with pytest.raises(AuroraError, match="9999, which this release does not know"):
            refused(engine)
    assert store.current(engine) == "9999"


def test_an_empty_database_asks_for_the_upgrade(empty_store_url: str) -> None:
    engine = store.connect(empty_store_url)
    assert store.current(engine) is None
    with pytest.raises(AuroraError, match="run: aurora-sgl db upgrade"):
        store.require_current(engine)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE deployment SET reason = 'nicer'",
        "DELETE FROM deployment",
        "UPDATE drafter_version SET weights_sha256 = 'x'",
        "DELETE FROM drafter_version WHERE id = 2",
        "UPDATE audit SET reason = 'nicer'",
        "DELETE FROM audit",
    ],
)
def test_history_can_not_be_changed(engine: Engine, statement: str) -> None:
    fill(engine)
    refusal = r"append-only|does not change|not deleted"
    with pytest.raises(DBAPIError, match=refusal), engine.begin() as connection:
        connection.execute(text(statement))
    with engine.begin() as connection:
        connection.execute(text("UPDATE drafter_version SET pinned = true, note = 'good'"))


def test_a_time_without_a_zone_is_refused(engine: Engine) -> None:
    with pytest.raises(Exception, match="without a zone"), store.session(engine) as s:
        queries.leases.acquire_lease(s, "train", "me", 5, now=datetime(2026, 1, 1))


def test_times_come_back_in_utc(engine: Engine) -> None:
    moment = datetime(2026, 11, 24, 3, 4, 5, 6, tzinfo=UTC)
    with store.session(engine) as s:
        queries.leases.acquire_lease(s, "train", "me", 5, now=moment)
    with store.session(engine, write=False) as s:
        lease = queries.leases.lease(s, "train")
    assert lease is not None
    assert lease.acquired_at == moment
    assert lease.expires_at - lease.acquired_at == timedelta(seconds=5)
    assert lease.acquired_at.tzinfo == UTC


def test_an_installed_wheel_upgrades_without_the_repository(
    empty_store_url: str, tmp_path: Path
) -> None:
    """pyproject puts ``migrations`` into the wheel as ``aurora_sgl/_migrations``."""
    root = Path(__file__).parents[3]
    hatch = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]
    place = hatch["build"]["targets"]["wheel"]["sources"]["migrations"]
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "aurora_sgl", tmp_path / "site" / "aurora_sgl", ignore=skip)
    shutil.copytree(root / "migrations", tmp_path / "site" / place, ignore=skip)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from aurora_sgl import store; "
        "print(store.upgrade(store.connect(sys.argv[2])), store.__file__)"
    )
    out = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "site"), empty_store_url],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    ).stdout.split()
    assert out[0] == store.head()
    assert out[1].startswith(str(tmp_path))
