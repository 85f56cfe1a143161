"""The gate: what a comparison says, what it spends, and that its row is enough to repeat it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.config import GateSettings
from aurora_sgl.evaluation.gate import FAIL, INCONCLUSIVE, PASS, judge, spent_by
from aurora_sgl.evaluation.record import record
from aurora_sgl.evaluation.replay import RequestReplay
from aurora_sgl.rollout import promote
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation
from aurora_sgl.training.settings import TrainSettings
from tests.support.rollout_house import RolloutHouse

RECIPE = TrainSettings(depth=3, topk=1)


def replayed(
    count: int, accepted: int, *, domain: str = "chat", first: int = 1
) -> list[RequestReplay]:
    """Requests of 40 steps that accept this much each, give or take two."""
    return [
        RequestReplay(number, 40, accepted + number % 5 - 2, domain)
        for number in range(first, first + count)
    ]


def more(found: list[RequestReplay], accepted: int) -> list[RequestReplay]:
    return [replace(one, accepted=one.accepted + accepted + one.request_id % 3) for one in found]


def test_better_worse_and_neither_have_their_verdicts() -> None:
    before = replayed(20, 30)
    assert judge(before, more(before, 4)).verdict == PASS
    assert judge(before, more(before, -8)).verdict == FAIL
    assert judge(before, more(before, -1)).verdict == INCONCLUSIVE  # -1, 0 or 1
    few = judge(before[:3], more(before[:3], 9))
    assert (few.verdict, few.attempt) == (INCONCLUSIVE, None), "three requests spend nothing"
    with pytest.raises(ValueError, match="the same requests"):
        judge(before, before[::-1])


def test_what_is_better_on_the_whole_but_worse_in_one_domain_fails() -> None:
    before = replayed(40, 30) + replayed(12, 30, domain="code", first=100)
    after = more(before[:40], 12) + more(before[40:], -12)
    found = judge(before, after)
    assert found.overall.ci_low > 0
    assert found.verdict == FAIL and "in code" in found.reason
    wide = GateSettings(domain_margin=0.5)
    assert judge(before, after, settings=wide).verdict == PASS


def test_the_same_difference_is_no_longer_enough_after_many_tries() -> None:
    before = replayed(12, 30)
    after = [
        replace(one, accepted=one.accepted + (3 if one.request_id % 2 else 0)) for one in before
    ]
    assert judge(before, after, attempt=1).verdict == PASS
    assert judge(before, after, attempt=30).verdict == INCONCLUSIVE
    assert sum(spent_by(k, 0.05) for k in range(1, 10_000)) < 0.05


def rows(engine: Engine, version_id: int) -> list[Evaluation]:
    with store.session(engine, write=False) as s:
        return list(queries.evaluations.evaluations(s, version_id))


def test_tries_against_one_live_version_spend_from_one_allowance(engine: Engine) -> None:
    house = RolloutHouse(engine)
    before = replayed(20, 30)

    def put(version: int, baseline: int, count: int) -> Evaluation:
        return record(engine, before[:count], more(before[:count], -1), candidate_id=version,
                      baseline_id=baseline, recipe=RECIPE)  # fmt: skip

    first, again = put(house.b, house.a, 20), put(house.b, house.a, 20)
    assert again.id == first.id, "the same requests again are the same try"
    second, third = put(house.b, house.a, 19), put(house.c, house.a, 20)
    assert put(house.c, house.a, 3).attempt is None, "too few to count as a try"
    assert [e.attempt for e in (first, second, third)] == [1, 2, 3]
    assert [e.alpha for e in (first, second, third)] == [spent_by(k, 0.05) for k in (1, 2, 3)]
    promote(engine, house.b, actor="ada", reason="a test")
    assert put(house.c, house.b, 20).attempt == 1, "against a new live version it is new"


def test_the_row_has_what_repeats_the_comparison(engine: Engine) -> None:
    house = RolloutHouse(engine)
    before = replayed(20, 30) + replayed(10, 20, domain="code", first=100)
    row = record(engine, before, more(before, 3), candidate_id=house.b, baseline_id=house.a,
                 recipe=RECIPE)  # fmt: skip
    told = row.details
    again = judge(
        [RequestReplay(r[0], r[3], r[2], r[1]) for r in told["requests"]],
        [RequestReplay(r[0], r[5], r[4], r[1]) for r in told["requests"]],
        attempt=row.attempt or 0,
        fewest=told["fewest"],
        seed=told["seed"],
        settings=GateSettings(**told["settings"]),
    )
    assert (again.verdict, again.overall.ci_low) == (row.verdict, row.ci_low)
    assert (row.depth, row.topk, told["candidate_sha256"]) == (3, 1, "b" * 64)
    domains = {e.domain: e for e in rows(engine, house.b) if e.domain}
    assert {name: e.requests for name, e in domains.items()} == {"chat": 20, "code": 10}
    assert all(e.details["evaluation_id"] == row.id for e in domains.values())
