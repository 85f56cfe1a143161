"""Two versions beside each other, as both databases have them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout.comparison import PairFacts, pair_facts
from aurora_sgl.rollout.equal_shape import positions, served_at_equal_shape
from aurora_sgl.store import queries
from tests.integration.rollout.test_trial import run
from tests.support import store_samples as samples
from tests.support.rollout_house import RolloutHouse


@pytest.fixture
def house(engine: Engine) -> RolloutHouse:
    return RolloutHouse(engine)


@pytest.fixture
def plain(upgraded_sqlite: Path, tmp_path: Path) -> Iterator[RolloutHouse]:
    """In SQLite, where a database makes no difference."""
    shutil.copy(upgraded_sqlite, tmp_path / "aurora.db")
    engine = store.connect(f"sqlite:///{tmp_path / 'aurora.db'}")
    yield RolloutHouse(engine)
    engine.dispose()


def facts(house: RolloutHouse, one: int, other: int) -> PairFacts:
    with store.session(house.engine, write=False) as s:
        return pair_facts(s, house.group_id, one, other)


def judge(house: RolloutHouse, candidate: int, baseline: int, gain: float, **details: Any) -> None:
    with store.session(house.engine) as s:
        queries.evaluations.add_evaluation(
            s, candidate_id=candidate, baseline_id=baseline, kind="replay", requests=20,
            verdict="pass", candidate_accept_length=2 + gain, baseline_accept_length=2,
            difference=gain, ci_low=gain - 0.1, ci_high=gain + 0.2, depth=3, topk=1, nodes=4,
            details={"by_domain": {"chat": {"requests": 9, "baseline": 2.0, "candidate": 2 + gain,
                                            "difference": gain, "ci_low": gain - 0.1,
                                            "ci_high": gain + 0.2, "verdict": "pass"}}, **details},
        )  # fmt: skip


def test_lineage_tells_the_steps_from_the_ancestor_that_both_have(plain: RolloutHouse) -> None:
    with store.session(plain.engine) as s:
        left = right = plain.a
        for letter in "defg":
            left = samples.add_version(s, plain.group_id, letter, parent_id=left)
        for letter in "hi":
            right = samples.add_version(s, plain.group_id, letter, parent_id=right)
        alone = samples.add_version(s, plain.group_id, "j", source="import")
    between = facts(plain, left, right).ancestry
    assert between.common == plain.a and list(map(len, between.ways)) == [4, 2]
    down = facts(plain, plain.a, left).ancestry
    assert down.common == plain.a and [step.version_id for step in down.ways[0]] == []
    assert down.ways[1][0].version_id == left and down.ways[1][-1].parent_id == plain.a
    apart = facts(plain, alone, left).ancestry
    assert apart.common is None and apart.ways[0][0].origin == "imported"


def test_only_what_differs_in_two_recipes_is_told_and_who_started_them(
    house: RolloutHouse,
) -> None:
    made = []
    for letter, rate, trigger in (("d", 1e-4, "drift"), ("e", 3e-4, "dashboard")):
        with store.session(house.engine) as s:
            if trigger == "dashboard":
                queries.audit.add_audit(s, house.group_id, actor="ada", action="train",
                                        subject="a training run", reason="new prompts")  # fmt: skip
            recipe = {"depth": 4, "optimizer": {"learning_rate": rate, "kind": "adam"}}
            began = queries.runs.start_run(s, house.group_id, trigger=trigger, objective="lk",
                                           base_version_id=house.a, config=recipe)  # fmt: skip
            queries.runs.finish_run(s, began.id, "succeeded", requests=7, tokens=900,
                                    metrics={"updates": 5, "curve": [1.0]})  # fmt: skip
            made.append(
                samples.add_version(s, house.group_id, letter, parent_id=house.a,
                                    training_run_id=began.id, vocab_sha256=letter * 64)
            )  # fmt: skip
    pair = facts(house, *made)
    rows = [(value.kind, value.name, value.values) for value in pair.differing]
    assert ("recipe", "optimizer.learning_rate", (1e-4, 3e-4)) in rows
    assert {name for _, name, _ in rows} == {"optimizer.learning_rate", "vocab_sha256"}
    assert not pair.same_vocabulary
    assert pair.runs[0] is not None and pair.runs[0].tokens == 900
    origins = [way[0].origin for way in pair.ancestry.ways]
    assert "trigger drift" in origins[0] and origins[1].endswith("on the page Training (ada)")


def test_a_replay_reads_the_same_whichever_was_the_candidate(house: RolloutHouse) -> None:
    rows = [[11, "chat", 10, 20, 30, 18, "greedy", ""], [12, "code", 30, 20, 10, 22, "greedy", ""],
            [13, "code", 1, 2, 2, 2, "greedy", ""], ["odd"]]  # fmt: skip
    judge(house, house.b, house.a, 0.5, requests=rows)
    there, back = facts(house, house.a, house.b), facts(house, house.b, house.a)
    one, other = there.replays[0], back.replays[0]
    assert (one.accept_length, one.difference) == ((2, 2.5), 0.5)
    assert (other.accept_length, other.difference) == ((2.5, 2), -0.5)
    assert (one.ci_low, one.ci_high) == pytest.approx((0.4, 0.7))
    assert (other.ci_low, other.ci_high) == pytest.approx((-0.7, -0.4))
    assert other.by_domain["chat"]["ci_high"] == pytest.approx(-0.4)
    worse, better = there.contrasts
    assert [each.request_id for each in better] == [11] and better[0].difference > 1
    assert [each.request_id for each in worse] == [12]
    assert [each.request_id for each in back.contrasts[0]] == [11]


def test_without_a_replay_of_both_a_third_version_is_named_as_such(plain: RolloutHouse) -> None:
    assert facts(plain, plain.b, plain.c).against is None
    judge(plain, plain.b, plain.a, 0.1)
    judge(plain, plain.c, plain.a, 0.3)
    against = facts(plain, plain.b, plain.c).against
    assert against is not None and against.baseline_id == plain.a
    assert [one.difference for one in against.replays] == [0.1, 0.3]
    judge(plain, plain.c, plain.b, 0.2)
    assert facts(plain, plain.b, plain.c).against is None


def test_live_traffic_is_compared_where_domain_and_shape_are_the_same(
    house: RolloutHouse,
) -> None:
    now = utc_now() - timedelta(hours=3)
    for domain, rate in (("chat", 0.3), ("code", 0.6)):
        now = house.serve(house.a, rate, since=now, domain=domain, requests=12, seed=1)
        now = house.serve(house.b, rate + 0.15, since=now, domain=domain, requests=12, seed=2)
    house.serve(house.b, 0.9, since=now, domain="code", requests=30, depth=5, seed=3)
    house.serve(house.a, 0.1, since=now, domain="sql", requests=2, seed=4)
    with store.session(house.engine, write=False) as s:
        served = served_at_equal_shape(s, house.group_id, house.a, house.b)
        turned = served_at_equal_shape(s, house.group_id, house.b, house.a)
        shares = positions(s, house.a, house.b)
        none = served_at_equal_shape(s, house.group_id, house.a, house.c)
    assert served.overall is not None and turned.overall is not None
    assert (served.overall.strata, served.overall.requests) == (2, (24, 24))
    assert 0.15 < served.overall.ci_low < served.overall.difference < served.overall.ci_high < 0.9
    assert turned.overall.difference == pytest.approx(-served.overall.difference)
    assert set(served.by_domain) == {"chat", "code"}
    assert list(served.by_shape) == ["depth 3, top-k 1, 4 nodes, greedy"]
    assert served.steps == (24 * 60 + 120, 24 * 60 + 30 * 60)
    assert served.compared_steps == (1440, 1440)
    assert shares is not None and (shares.depth, shares.steps) == (3, (1440, 1440))
    lengths = [1 + sum(side) for side in shares.reached]  # of equally many steps a stratum
    assert lengths == pytest.approx(served.overall.accept_length)
    assert none.overall is None and none.steps == (24 * 60 + 120, 0)


def test_where_servers_choose_trees_shapes_are_taken_together(plain: RolloutHouse) -> None:
    now = utc_now() - timedelta(hours=3)
    for version in (plain.a, plain.b):
        for depth in (2, 4):
            now = plain.serve(version, 0.5, since=now, requests=6, depth=depth, seed=depth)
    plain.say(trees=1.0)
    with store.session(plain.engine) as s:
        queries.servers.register_server(
            s, plain.group_id, type(samples.hello())(plain.boot_id, 1, {"name": "x"}, 0, 0, 0,
                                                     {"trees": 1.0}))  # fmt: skip
    with store.session(plain.engine, write=False) as s:
        served = served_at_equal_shape(s, plain.group_id, plain.a, plain.b)
    assert served.over_shapes and served.overall is not None
    assert (served.overall.strata, served.overall.requests) == (1, (12, 12))


def test_a_trial_is_told_from_either_side(plain: RolloutHouse) -> None:
    run(plain, {plain.a: 0.3, plain.b: 0.6}, {plain.a: 50, plain.b: 50})
    (there,), (back,) = (facts(plain, *ids).trials for ids in ((plain.a, plain.b),
                                                              (plain.b, plain.a)))  # fmt: skip
    assert there.verdict == "pass" and len(there.turns) == 8
    assert there.difference is not None and there.difference > 0
    assert back.difference == pytest.approx(-there.difference)
    assert back.accept_length == there.accept_length[::-1]
    assert {turn.version_id for turn in there.turns} == {plain.a, plain.b}


def test_what_is_no_version_of_the_group_is_refused(plain: RolloutHouse) -> None:
    with store.session(plain.engine) as s:
        group = queries.groups.ensure_group(s, "other", "t", "", "LlamaForCausalLMEagle3")
        foreign = samples.add_version(s, group.id, "z")
    for other in (0, -1, 999, 2**31, 10**18, foreign):
        with pytest.raises(AuroraError, match=f"there is no version {other} in this group"):
            facts(plain, plain.a, other)
    with pytest.raises(AuroraError, match="the same as itself"):
        facts(plain, plain.a, plain.a)
