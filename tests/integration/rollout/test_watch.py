"""The watch over a promotion, on rows that came in as the sidecar brings them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import WatchSettings
from aurora_sgl.errors import Refused
from aurora_sgl.evaluation.record import record
from aurora_sgl.evaluation.replay import RequestReplay
from aurora_sgl.rollout import promote, rollback, watch
from aurora_sgl.rollout.watch import WatchStatus
from aurora_sgl.scheduler.facts import recipe_as_served
from aurora_sgl.store import queries
from aurora_sgl.store.models import Request
from aurora_sgl.training.settings import TrainSettings
from tests.support import store_samples as samples
from tests.support.rollout_house import RolloutHouse

RULES = WatchSettings(windows=2, failures=2, steps=200, requests=4, seconds=60)


@pytest.fixture
def house(engine: Engine) -> RolloutHouse:
    """Version a has served for an hour; b has just been promoted."""
    house = RolloutHouse(engine)
    house.serve(house.a, 0.5, since=utc_now() - timedelta(hours=1), requests=60)
    promote(engine, house.b, actor="ada", reason="a test", force=True)
    house.follow(house.b)
    return house


def begun(house: RolloutHouse):
    found = watch.status(house.engine, "default")
    assert found is not None
    return found.watch.started_at


def tick(house: RolloutHouse, seconds: float) -> WatchStatus:
    """A look so many seconds after the promotion."""
    now = begun(house) + timedelta(seconds=seconds)
    found = watch.tick(house.engine, house.group_id, settings=RULES, now=now)
    assert found is not None
    return found


def live(house: RolloutHouse) -> int:
    with store.session(house.engine, write=False) as s:
        return queries.aliases.aliases(s, house.group_id)["live"]


def test_a_much_worse_version_is_rolled_back_after_one_window(house: RolloutHouse) -> None:
    house.serve(house.b, 0.2, since=begun(house), requests=4)
    found = tick(house, 5)
    assert (found.watch.status, len(found.windows)) == ("failed", 1)
    assert found.windows[0].verdict == "fail"
    assert live(house) == house.a
    with store.session(house.engine, write=False) as s:
        row = queries.deployments.deployments(s, house.group_id, limit=1)[0]
        (mark,) = [e for e in queries.evaluations.evaluations(s, house.b) if e.kind == "live"]
    assert (row.action, row.actor, row.version_id) == ("rollback", "watch", house.a)
    assert "worse beyond doubt" in row.reason
    assert row.evidence["windows"][0]["accept_length"] < 1.6
    assert (mark.verdict, mark.baseline_id) == ("fail", house.a)
    with pytest.raises(Refused, match="rolled back by the watch"):
        promote(house.engine, house.b, actor="scheduler", reason="again")
    assert promote(house.engine, house.b, actor="ada", reason="I know", force=True).changed


def test_a_watch_from_before_nodes_were_in_its_keys_takes_its_baseline_anew(
    house: RolloutHouse,
) -> None:
    before = tick(house, 1).watch.baseline
    with store.session(house.engine) as s:
        watching = queries.watches.running_watch(s, house.group_id)
        assert watching is not None
        strata = {key.replace("/4/", "/", 1): sums for key, sums in before["strata"].items()}
        watching.baseline = {"strata": strata, "paces": {}}
    house.serve(house.b, 0.2, since=begun(house), requests=4)
    found = tick(house, 5)
    assert found.watch.baseline["strata"] == before["strata"]
    assert found.windows[0].verdict == "fail", "it was compared"


@pytest.mark.parametrize("before", [6, 3])
def test_little_traffic_before_is_enough_to_see_a_damaged_version(
    engine: Engine, before: int
) -> None:
    house = RolloutHouse(engine)
    house.serve(house.a, 0.5, since=utc_now() - timedelta(hours=1), requests=before)
    promote(engine, house.b, actor="ada", reason="a slip of the hand", force=True)
    house.serve(house.b, 0.0, since=begun(house), requests=6)
    found = tick(house, 8)
    assert (found.watch.status, len(found.windows)) == ("failed", 1)
    assert found.windows[0].verdict == "fail" and live(house) == house.a


def test_two_requests_that_happened_to_be_alike_are_no_proof(engine: Engine) -> None:
    house = RolloutHouse(engine)
    for seed in (5, 5):  # the same accepted drafts twice
        house.serve(
            house.a, 0.55, since=utc_now() - timedelta(hours=1), requests=1, steps=200, seed=seed
        )
    promote(engine, house.b, actor="ada", reason="a test", force=True)
    house.serve(house.b, 0.40, since=begun(house), requests=8)
    found = tick(house, 20)
    assert all(w.verdict != "fail" for w in found.windows) and found.windows
    assert live(house) == house.b


def test_training_and_replay_take_whole_trees_whatever_most_steps_carried(engine: Engine) -> None:
    house = RolloutHouse(engine)
    house.serve(house.a, 0.5, since=utc_now() - timedelta(hours=1), requests=4)  # of another shape
    with store.session(engine) as s:
        seen = TrainSettings(**recipe_as_served(s, house.group_id, {}))
        counters = {"depth": 3.0, "topk": 4.0, "nodes": 8.0}
        queries.servers.touch_server(s, house.server_id, counters=counters)
        recipe = TrainSettings(**recipe_as_served(s, house.group_id, {}))
    assert (recipe.depth, recipe.topk, recipe.nodes) == (3, 4, 8)
    assert (seen.depth, seen.topk) != (3, 4)


def test_where_nothing_was_served_before_replay_says_what_to_expect(engine: Engine) -> None:
    house = RolloutHouse(engine)
    requests = [RequestReplay(number, 60, 52, "chat") for number in range(1, 14)]
    with store.session(engine) as s:
        s.add_all(
            Request(
                id=one.request_id, server_id=house.server_id, admitted_at=utc_now(),
                accept_rule="greedy",
            )
            for one in requests[:12]  # the last was deleted meanwhile, with its accept rule
        )  # fmt: skip
        recipe = TrainSettings(**recipe_as_served(s, house.group_id, {"depth": 3, "topk": 1}))
    worse = [replace(one, accepted=20) for one in requests]
    passed = record(
        engine, worse, requests, candidate_id=house.b, baseline_id=house.a, recipe=recipe
    )
    assert passed.verdict == "pass"
    promote(engine, house.b, actor="ada", reason="a test", evaluation_id=passed.id)
    promote(engine, house.c, actor="ada", reason="a slip of the hand", force=True)
    house.serve(house.c, 0.0, since=begun(house), requests=6)
    found = tick(house, 8)
    assert (found.watch.status, len(found.windows)) == ("failed", 1)
    assert found.watch.baseline["replayed"] == {"requests": 12, "evaluation_id": passed.id}
    assert found.windows[0].expected_accept_length == pytest.approx(1 + 52 / 60)
    assert live(house) == house.b


def test_a_version_as_good_as_before_passes_and_stays(house: RolloutHouse) -> None:
    house.serve(house.b, 0.5, since=begun(house), requests=10, seed=1)
    found = tick(house, 30)
    assert found.watch.status == "passed", found.watch.reason
    assert [w.verdict for w in found.windows] == ["pass", "pass"]
    assert live(house) == house.b
    assert watch.tick(house.engine, house.group_id) is None
    with store.session(house.engine, write=False) as s:
        (mark,) = [e for e in queries.evaluations.evaluations(s, house.b) if e.kind == "live"]
    assert mark.verdict == "pass" and mark.baseline_accept_length == pytest.approx(1.87, abs=0.15)


def test_a_domain_that_is_served_more_now_is_compared_with_itself(engine: Engine) -> None:
    house = RolloutHouse(engine)
    hour = utc_now() - timedelta(hours=1)
    house.serve(house.a, 0.7, since=hour, requests=40)
    house.serve(house.a, 0.2, since=hour, requests=20, domain="code")
    promote(engine, house.b, actor="ada", reason="a test")
    house.serve(house.b, 0.2, since=begun(house), requests=10, domain="code", seed=3)
    found = tick(house, 30)
    assert found.watch.status == "passed", [w.reason for w in found.windows]


@pytest.mark.parametrize("chooses_trees", [False, True])
def test_where_a_server_chooses_its_trees_all_shapes_of_a_request_count_together(
    engine: Engine, chooses_trees: bool
) -> None:
    house = RolloutHouse(engine)
    with store.session(engine) as s:
        for server in queries.servers.servers(s, house.group_id):
            server.counters = {"trees": float(chooses_trees)}
    house.serve(house.a, 0.5, since=utc_now() - timedelta(hours=1), requests=60, depth=3)
    promote(engine, house.b, actor="ada", reason="a test", force=True)
    house.follow(house.b)
    house.serve(house.b, 0.1, since=begun(house), requests=8, depth=2)
    window = tick(house, 90).windows[0]
    assert (window.verdict == "fail") == chooses_trees
    assert ("nothing of the kind was served before" in window.reason) != chooses_trees


def test_a_server_that_chose_its_trees_once_does_not_count_for_ever(engine: Engine) -> None:
    house = RolloutHouse(engine)
    with store.session(engine) as s:
        old = queries.servers.register_server(s, house.group_id, samples.hello(99))
        old.counters, old.state = {"trees": 1.0}, "stopped"
    house.serve(house.a, 0.5, since=utc_now() - timedelta(hours=1), requests=2, depth=3)
    with store.session(engine, write=False) as s:
        counts = queries.request_counts.request_counts(s, house.group_id, house.a)
    assert {one.depth for one in counts} == {3}


def test_requests_from_before_the_swap_do_not_count(house: RolloutHouse) -> None:
    house.serve(house.b, 0.1, since=begun(house), requests=10, mixed=True)
    found = tick(house, 30)
    assert found.windows == []


def test_tokens_that_come_slower_than_before_are_bad(house: RolloutHouse) -> None:
    since = begun(house)
    since = house.serve(house.b, 0.5, since=since, requests=4, step_ms=120, apart=8)
    house.serve(house.b, 0.5, since=since, requests=4, step_ms=120, apart=8, seed=1)
    found = tick(house, 70)
    assert [w.verdict for w in found.windows] == ["bad", "bad"]
    assert "tokens/s of a stream" in found.windows[0].reason
    assert found.watch.status == "failed" and live(house) == house.a


def test_without_drafts_of_the_version_windows_are_empty_and_roll_back(
    house: RolloutHouse,
) -> None:
    since = begun(house)
    for window in range(3):
        house.serve(house.a, 0.5, since=since + timedelta(seconds=70 * window), requests=2)
    found = tick(house, 400)
    assert {w.verdict for w in found.windows} == {"empty"}
    assert found.watch.status == "failed" and live(house) == house.a


def test_no_traffic_is_no_evidence(house: RolloutHouse) -> None:
    with store.session(house.engine) as s:
        later = begun(house) + timedelta(hours=5)
        queries.servers.touch_server(s, house.server_id, last_seen_at=later)
    found = tick(house, 3600 * 5)
    assert found.windows == [] and live(house) == house.b


def test_servers_that_are_gone_after_a_promotion_count_against_it(house: RolloutHouse) -> None:
    found = tick(house, 70)
    assert found.windows[0].verdict == "empty" and "no server" in found.windows[0].reason
    assert live(house) == house.b, "one is not enough"
    tick(house, 200)
    assert live(house) == house.a


def test_a_clock_that_was_set_back_does_not_blind_the_watch(house: RolloutHouse) -> None:
    back = begun(house) - timedelta(hours=2)
    assert watch.tick(house.engine, house.group_id, settings=RULES, now=back) is not None
    house.serve(house.b, 0.2, since=back + timedelta(seconds=1), requests=4)
    now = back + timedelta(seconds=10)
    found = watch.tick(house.engine, house.group_id, settings=RULES, now=now)
    assert found is not None and found.watch.status == "failed"
    assert live(house) == house.a


def test_another_deployment_ends_the_watch_and_begins_its_own(house: RolloutHouse) -> None:
    promote(house.engine, house.c, actor="ada", reason="better still", force=True)
    found = watch.status(house.engine, "default")
    assert found is not None and found.watch.version_id == house.c
    with store.session(house.engine, write=False) as s:
        first = queries.watches.watches(s, house.group_id)[-1]
    assert first.status == "ended" and "version" in first.reason
    rollback(house.engine, "default", actor="ada", reason="no")
    assert watch.tick(house.engine, house.group_id) is None, "a rollback is not watched"


def test_a_watch_that_died_in_the_middle_of_its_rollback_is_finished_by_the_next(
    house: RolloutHouse,
) -> None:
    house.serve(house.b, 0.2, since=begun(house), requests=4)
    with store.session(house.engine) as s:  # the window was written, then the process died
        row = queries.watches.running_watch(s, house.group_id)
        assert row is not None
        row.settings = RULES.model_dump(mode="json")
        row.baseline = {"strata": {}, "paces": {}}
        queries.watches.add_watch_window(
            s, watch_id=row.id, number=1, started_at=row.started_at, finished_at=row.started_at,
            requests=4, verify_steps=240, accepted=60, accept_length=1.25,
            expected_accept_length=1.9, verdict="fail", reason="worse beyond doubt", metrics={},
        )  # fmt: skip
    found = tick(house, 1)
    assert found.watch.status == "failed" and len(found.windows) == 1
    assert live(house) == house.a
