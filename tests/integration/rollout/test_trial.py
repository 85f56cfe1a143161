"""The switchback trial and the kill switches, on both databases."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import TrialSettings
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.rollout import pin, promote, status, switches, trial, unpin
from aurora_sgl.store import queries
from tests.support.rollout_house import RolloutHouse

RULES = TrialSettings(pairs=4, window_seconds=30, warm_seconds=5)


@pytest.fixture
def house(engine: Engine) -> RolloutHouse:
    return RolloutHouse(engine)


def wanted(house: RolloutHouse, now: datetime) -> int:
    with store.session(house.engine, write=False) as s:
        found = queries.aliases.wanted_version(s, house.group_id, now)
    assert found is not None
    return found.version_id


def run(house: RolloutHouse, rates: dict[int, float], step_ms: dict[int, float]):
    """A whole trial in which the server serves what is wanted, at these rates."""
    trial.start(house.engine, house.b, actor="ada", reason="is it faster?", settings=RULES)
    now = utc_now()
    seen = []
    for window in range(2 * RULES.pairs):
        trial.tick(house.engine, house.group_id, now=now)
        version = wanted(house, now)
        seen.append(version)
        house.serve(
            version, rates[version], since=now + timedelta(seconds=6), requests=6, steps=30,
            step_ms=step_ms[version], seed=window, apart=3,
        )  # fmt: skip
        now += timedelta(seconds=RULES.window_seconds)
    for _ in range(3):
        found = trial.tick(house.engine, house.group_id, now=now)
        now += timedelta(seconds=10)
    ended = trial.status(house.engine, "default")
    assert found is None and ended is not None
    return seen, ended


def test_versions_take_turns_in_pairs_and_the_faster_one_passes(house: RolloutHouse) -> None:
    seen, ended = run(house, {house.a: 0.3, house.b: 0.6}, {house.a: 50, house.b: 50})
    assert all(set(pair) == {house.a, house.b} for pair in zip(seen[::2], seen[1::2], strict=True))
    assert (ended.trial.status, ended.trial.verdict) == ("finished", "pass")
    assert ended.evaluation is not None and ended.evaluation.kind == "trial"
    speed = ended.evaluation.details["stream_tokens_per_second"]
    assert speed["pairs"] == 4 and speed["ci_low"] > 0
    with store.session(house.engine, write=False) as s:
        assert queries.aliases.aliases(s, house.group_id)["live"] == house.a, (
            "a trial promotes nothing"
        )


def test_a_longer_accept_length_at_fewer_tokens_per_second_fails(house: RolloutHouse) -> None:
    _, ended = run(house, {house.a: 0.5, house.b: 0.6}, {house.a: 40, house.b: 90})
    assert ended.trial.verdict == "fail", ended.trial.details


def test_equal_versions_are_not_told_apart(house: RolloutHouse) -> None:
    _, ended = run(house, {house.a: 0.5, house.b: 0.5}, {house.a: 50, house.b: 50})
    assert ended.trial.verdict == "inconclusive"


def test_when_nobody_carries_a_trial_on_the_servers_go_back_by_themselves(
    house: RolloutHouse,
) -> None:
    trial.start(house.engine, house.b, actor="ada", reason="x", settings=RULES)
    now = utc_now()
    for _ in range(2):
        trial.tick(house.engine, house.group_id, now=now)
        if wanted(house, now) == house.b:
            break
        now += timedelta(seconds=31)
    assert wanted(house, now) == house.b
    assert wanted(house, now + timedelta(minutes=2)) == house.a


def test_a_stopped_trial_gives_the_servers_back_at_once_and_says_who_stopped_it(
    house: RolloutHouse,
) -> None:
    trial.start(house.engine, house.b, actor="ada", reason="x", settings=RULES)
    trial.tick(house.engine, house.group_id)
    with pytest.raises(AuroraError, match="reason"):
        trial.stop(house.engine, "default", actor="ada", reason=" ")
    assert trial.stop(house.engine, "default", actor="bob", reason="too slow", dry_run=True)
    assert trial.stop(house.engine, "default", actor="bob", reason="too slow") is not None
    assert wanted(house, utc_now()) == house.a
    assert trial.stop(house.engine, "default", actor="bob", reason="again") is None
    actions = [(row.actor, row.action) for row in status.audit(house.engine, "default")]
    assert actions == [("bob", "trial_stop"), ("ada", "trial_start")]


def test_a_trial_is_refused_where_it_makes_no_sense(house: RolloutHouse) -> None:
    def begin(version: int, **kw: object):
        return trial.start(house.engine, version, **{"actor": "ada", "reason": "x", **kw})

    with pytest.raises(AuroraError, match="reason"):
        begin(house.b, reason="")
    with pytest.raises(AuroraError, match="no drafter version 99"):
        begin(99)
    with pytest.raises(Refused, match="is live"):
        begin(house.a)
    assert begin(house.b, dry_run=True).trial_id is None
    begin(house.b)
    with pytest.raises(Refused, match="trial 1 of version"):
        begin(house.c)
    with pytest.raises(Refused, match=r"trial 1 .* is running"):
        promote(house.engine, house.c, actor="ada", reason="x")
    promote(house.engine, house.c, actor="ada", reason="x", force=True)
    with pytest.raises(Refused, match="being watched"):
        begin(house.b)


def test_a_second_promotion_waits_until_servers_have_followed_the_first(
    house: RolloutHouse,
) -> None:
    promote(house.engine, house.b, actor="ada", reason="x")
    with pytest.raises(Refused, match=r"version \d is still on its way to test:30000"):
        promote(house.engine, house.c, actor="bob", reason="y")
    house.follow(house.b)
    assert promote(house.engine, house.c, actor="bob", reason="y").changed


def test_a_switch_that_is_off_refuses_what_it_stands_for_and_is_audited(
    house: RolloutHouse,
) -> None:
    turn = switches.turn
    for wrong in ("", "  "):
        with pytest.raises(AuroraError, match="reason"):
            turn(house.engine, "default", "auto_promote", False, actor="ada", reason=wrong)
    with pytest.raises(AuroraError, match="there is: learning, auto_promote"):
        turn(house.engine, "default", "lights", False, actor="ada", reason="x")
    dry = turn(house.engine, "default", "auto_promote", False, actor="a", reason="x", dry_run=True)
    assert dry.changed and switches.read(house.engine, "default")[1].on
    assert turn(house.engine, "default", "auto_promote", False, actor="ada", reason="x").changed
    assert not turn(house.engine, "default", "auto_promote", False, actor="b", reason="y").changed
    with pytest.raises(Refused, match="auto_promote is switched off"):
        promote(house.engine, house.b, actor="scheduler", reason="x", only_if_on="auto_promote")
    assert promote(house.engine, house.b, actor="ada", reason="by hand").changed
    assert [row.actor for row in status.audit(house.engine, "default")] == ["ada"]


def test_pins_have_a_reason_and_are_audited(house: RolloutHouse) -> None:
    with pytest.raises(AuroraError, match="reason"):
        pin(house.engine, house.b, actor="ada", reason=" ")
    assert pin(house.engine, house.b, actor="ada", reason="known good").changed
    assert not pin(house.engine, house.b, actor="ada", reason="known good").changed
    assert unpin(house.engine, house.b, actor="ada", reason="old").changed
    assert [row.action for row in status.audit(house.engine, "default")] == ["unpin", "pin"]


@pytest.mark.parametrize("table", ["deployment", "audit"])
@pytest.mark.parametrize("change", ["UPDATE {} SET reason = 'nicer'", "DELETE FROM {}"])
def test_the_database_itself_refuses_to_change_what_was_done(
    house: RolloutHouse, table: str, change: str
) -> None:
    pin(house.engine, house.b, actor="ada", reason="x")
    with pytest.raises(DBAPIError, match="append-only"), house.engine.begin() as connection:
        connection.execute(text(change.format(table)))
    with house.engine.connect() as connection:
        assert connection.scalar(text(f"SELECT count(*) FROM {table} WHERE reason <> 'nicer'")) == 1
