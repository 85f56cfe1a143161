"""Case "opted-out requests": the store has counts of them and no tokens, whoever sends them."""

from __future__ import annotations

import msgspec
import pytest
from sqlalchemy import Engine, text

from aurora_sgl import store, wire
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import IngestRules, ingest
from dashboard import steps as told
from dashboard.steps import ACCEPTED, CORRECTION
from tests.integration.store.test_ingest import contents, register
from tests.support import store_samples as samples

TOKENS = ("draft_tokens", "draft_parents", "accepted_nodes", "target_tokens")
WITH, WITHOUT = 1, 2  # requests


def traffic() -> list[tuple[int, list[wire.Record]]]:
    """Two requests with the same steps, as an engine of before sends them: tokens of both."""
    agreed = samples.started(WITH)
    refused = msgspec.structs.replace(samples.started(WITHOUT), may_train=False)
    steps: list[wire.Record] = [
        make(number)
        for number in (WITH, WITHOUT)
        for make in (
            lambda number: samples.chain_step(number, 0, 2),
            lambda number: samples.tree_step(number, 1),
            lambda number: samples.chain_step(number, 2, 3),
        )
    ]
    return [(1, [agreed, refused]), (2, steps)]


def events(engine: Engine, number: int) -> list[dict[str, object]]:
    with store.session(engine, write=False) as s:
        return queries.events.events(s, wire.request_id(samples.BOOT, number))


def test_what_an_older_engine_sends_of_them_is_left_out_and_counted_all_the_same(
    engine: Engine,
) -> None:
    server_id = register(engine)
    ingest(engine, server_id, samples.BOOT, traffic())
    plain, bare = events(engine, WITH), events(engine, WITHOUT)
    assert len(plain) == len(bare) == 3
    for one, other in zip(plain, bare, strict=True):
        assert all(one[name] for name in TOKENS)
        assert [other[name] for name in TOKENS] == [[]] * 4
        same = set(one) - {*TOKENS, "request_id"}
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
    first, second = contents(engine)["request"]
    assert first["accepted"] == second["accepted"] == 6 and second["proposed"] == 10
    ingest(engine, server_id, samples.BOOT, traffic())
    assert events(engine, WITHOUT) == bare, "the same batch again changes nothing"


def test_no_view_fails_on_them_or_shows_a_token(engine: Engine) -> None:
    ingest(engine, register(engine), samples.BOOT, traffic())
    request_id = wire.request_id(samples.BOOT, WITHOUT)
    with store.reading(engine) as connection:
        for view in ("v_rejected_tokens", "v_acceptance_event"):
            rows = connection.execute(text(f"SELECT * FROM {view}")).mappings().all()
            own = [row for row in rows if row["request_id"] == request_id]
            assert any(row["request_id"] != request_id for row in rows)
            if view == "v_rejected_tokens":
                assert own == []
            else:
                assert [str(row["draft_tokens"]) for row in own] == ["[]"] * 3
                assert [row["accept_length"] for row in own] == [3, 2, 4]


def test_the_page_of_one_is_told_from_its_counts(engine: Engine) -> None:
    ingest(engine, register(engine), samples.BOOT, traffic())
    rows = events(engine, WITHOUT)
    assert not told.have_tokens(rows) and told.have_tokens(events(engine, WITH))
    kinds = [[token.kind for token in step.tokens] for step in told.tell(rows)]
    assert kinds[:2] == [[ACCEPTED, ACCEPTED, CORRECTION], [ACCEPTED, CORRECTION]]
    assert {token.id for step in told.tell(rows) for token in step.tokens} == {told.UNKNOWN}
    assert kinds == [[t.kind for t in step.tokens] for step in told.tell(events(engine, WITH))]


@pytest.mark.parametrize("keeps", [False, True])
def test_a_setting_keeps_them(engine: Engine, keeps: bool) -> None:
    rules = IngestRules(keep_opted_out_tokens=keeps)
    ingest(engine, register(engine), samples.BOOT, traffic(), rules=rules)
    assert told.have_tokens(events(engine, WITHOUT)) is keeps
    assert told.have_tokens(events(engine, WITH))


def test_a_step_whose_start_was_lost_has_no_tokens(engine: Engine) -> None:
    """Nobody knows whether its client agreed."""
    server_id = register(engine)
    ingest(engine, server_id, samples.BOOT, traffic()[1:])
    assert not told.have_tokens(events(engine, WITH))
