"""Who is there: silence, locks that somebody sits on, and a store that is away."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from aurora_sgl import store
from aurora_sgl.cli import _one_line
from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout import switches
from aurora_sgl.store import locks, queries
from aurora_sgl.store.liveness import (
    LOST_SECONDS,
    SILENT_SECONDS,
    STALE_SECONDS,
    TRAINING_LEASE_SECONDS,
    is_silent,
    training_lease_name,
)
from aurora_sgl.training import lease


@pytest.fixture
def group_id(engine: Engine) -> int:
    with store.session(engine) as s:
        return queries.groups.ensure_group(s, "default", "t", "", "LlamaForCausalLMEagle3").id


def failure(engine: Engine, statement: str) -> Exception:
    with pytest.raises(Exception) as raised, engine.begin() as database:
        database.execute(text(statement))
    return raised.value


def test_silence_is_longer_than_the_span_and_the_spans_are_in_order() -> None:
    now = utc_now()
    assert not is_silent(now - timedelta(seconds=SILENT_SECONDS), now)
    assert is_silent(now - timedelta(seconds=SILENT_SECONDS + 0.1), now)
    assert not is_silent(now - timedelta(seconds=SILENT_SECONDS + 0.1), now, LOST_SECONDS)
    assert STALE_SECONDS < SILENT_SECONDS < LOST_SECONDS < TRAINING_LEASE_SECONDS


def test_a_lock_is_free_once_nobody_sits_on_it(engine: Engine, group_id: int) -> None:
    with store.session(engine) as s:
        queries.groups.lock_group(s, group_id)
        assert not locks.is_free(engine, group_id)
    assert locks.is_free(engine, group_id)


def test_what_can_be_mended_in_the_store_is_one_line_and_our_own_mistakes_are_not(
    engine: Engine, group_id: int
) -> None:
    missing = failure(engine, "SELECT * FROM no_such_table")
    line = _one_line(missing)
    assert line is not None and line.startswith("the store can't be used now: a table or column")
    twice = "INSERT INTO lease SELECT 'x', '', 0, '2026-01-01', '2026-01-01' FROM lease"
    with store.session(engine) as s:
        queries.leases.acquire_lease(s, "x", "me", 5)
    assert _one_line(failure(engine, twice)) is None


def test_training_goes_on_while_the_store_is_away_and_stops_for_a_defect(
    engine: Engine, group_id: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.0)
    away = failure(engine, "SELECT * FROM no_such_table")

    def refuse(*_: Any) -> bool:
        raise broken

    with lease.training_lease(engine, group_id) as renew, monkeypatch.context() as patch:
        patch.setattr(queries.switches, "is_on", refuse)
        broken: Exception = away
        with caplog.at_level(logging.WARNING):
            renew({})
        assert "the store is away, training goes on: a table or column" in caplog.text
        broken = ZeroDivisionError("ours")
        with pytest.raises(ZeroDivisionError):
            renew({})
    with store.session(engine, write=False) as s:
        held = queries.leases.lease(s, training_lease_name(group_id))
    assert held is not None and held.expires_at <= utc_now(), "given back"


def test_a_run_that_sees_the_switch_first_gives_the_same_reason_as_its_scheduler(
    engine: Engine, group_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.0)
    with lease.training_lease(engine, group_id) as renew:
        renew({})
        switches.turn(engine, "default", switches.LEARNING, False, actor="ada", reason="too warm")
        with pytest.raises(AuroraError) as raised:
            renew({})
    assert str(raised.value) == switches.LEARNING_WENT_OFF
