"""``v_rejected_tokens``: the rows that it always had, and only as much work as is asked for."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
from sqlalchemy import Engine, text

from aurora_sgl import store, wire
from aurora_sgl.store import queries
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.schema import scripts_folder
from dashboard.screens.sql import TOKEN_EXAMPLES
from tests.support import store_samples as samples

INT32 = 2**31


def random_tree(rng: random.Random, number: int, step: int) -> wire.VerifyStep:
    """Any tree of up to 16 nodes, any path of it accepted; tokens over the whole of int32."""
    nodes = rng.randrange(1, 17)
    parents = [rng.randrange(node) for node in range(1, nodes)]
    path: list[int] = []
    while rng.random() < 0.6:
        children = [i + 1 for i, parent in enumerate(parents) if parent == (path or [0])[-1]]
        if not children:
            break
        path.append(rng.choice(children))
    last = (path or [0])[-1]
    rule = rng.choice(["greedy", "target_sampling"])
    count = nodes if rule == "greedy" else len(path) + 1
    return wire.VerifyStep(
        request_id=wire.request_id(samples.BOOT, number), step=step,
        at_us=samples.START_US + 1000 * step, version_id=0, swap_age=0, mixed=False,
        position=12 + step, depth=max(1, nodes - 1), topk=2, nodes=nodes, accept_rule=rule,
        batch_size=1, proposed=nodes - 1, accepted=len(path), kept=len(path) + 1,
        first_rejected_at=len(path) + 1 if last in parents else 0,
        draft_tokens=[rng.randrange(-INT32, INT32) for _ in parents], draft_parents=parents,
        accepted_nodes=path, target_tokens=[rng.randrange(-INT32, INT32) for _ in range(count)],
    )  # fmt: skip


@pytest.fixture
def filled(engine: Engine) -> Engine:
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        server_id = queries.servers.register_server(s, group.id, samples.hello()).id
    rng = random.Random(5)
    records: list[wire.Record] = []
    for number in range(1, 41):
        records.append(samples.started(number))
        records += [random_tree(rng, number, step) for step in range(12)]
        records.append(samples.finished(number, []))
    ingest(engine, server_id, samples.BOOT, [(1, records)])
    return engine


def before(dialect: str) -> str:
    """The view as schema 0003 had it."""
    place = next((scripts_folder() / "versions").glob("0003_*.py"))
    spec = importlib.util.spec_from_file_location("views_0003", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.rejected_tokens(dialect)).replace("v_rejected_tokens", "rejected_before")


def test_v_rejected_tokens_has_the_rows_of_the_window_over_all_events(filled: Engine) -> None:
    with filled.begin() as connection:
        connection.exec_driver_sql(before(filled.dialect.name))
        rows = {
            view: connection.execute(
                text(f"SELECT * FROM {view} ORDER BY request_id, step, rank")
            ).all()
            for view in ("v_rejected_tokens", "rejected_before")
        }
    assert len(rows["rejected_before"]) > 200
    assert max(row.rank for row in rows["rejected_before"]) > 2
    assert rows["v_rejected_tokens"] == rows["rejected_before"]


def plan(engine: Engine, query: str) -> str:
    explain = "EXPLAIN QUERY PLAN" if is_sqlite(engine) else "EXPLAIN"
    with engine.begin() as connection:
        rows: list[Any] = list(connection.execute(text(f"{explain} {query}")))
        return "\n".join(str(row[-1]) for row in rows)


def test_a_condition_on_it_reads_only_the_events_that_are_asked_for(filled: Engine) -> None:
    """At 100 million events anything else takes minutes."""
    (example,) = TOKEN_EXAMPLES.values()
    last_hour = "SELECT count(*) FROM v_rejected_tokens WHERE at > '2026-11-18 11:05:00.000000'"
    by_example = plan(filled, example)
    by_time = plan(filled, last_hour)
    if is_sqlite(filled):
        for tree, range_ in ((by_example, "at>? AND at<?"), (by_time, "at>?")):
            assert f"SEARCH e USING INDEX ix_acceptance_event_at ({range_})" in tree, tree
    else:  # which index is taken depends on the size; nothing is numbered first
        assert "WindowAgg" not in by_example + by_time
    assert "TEMP B-TREE" not in plan(filled, "SELECT * FROM v_rejected_tokens LIMIT 10")
    with filled.begin() as connection:
        assert connection.execute(text(example)).all()


def test_a_step_whose_tokens_are_not_kept_has_no_token_and_no_error(filled: Engine) -> None:
    with filled.begin() as connection:
        empty = "x''" if is_sqlite(filled) else "''::bytea"
        connection.exec_driver_sql(
            f"UPDATE acceptance_event SET draft_tokens = {empty}, target_tokens = {empty}"
        )
        rows = connection.execute(
            text("SELECT draft_token, target_token FROM v_rejected_tokens")
        ).all()
    assert len(rows) > 200 and set(rows) == {(None, None)}
