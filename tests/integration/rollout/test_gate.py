"""The gate: what a comparison says, what it spends, and that its row is enough to repeat it."""

from __future__ import annotations

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import GateSettings
from aurora_sgl.evaluation.gate import FAIL, judge
from aurora_sgl.evaluation.line import line_of, standing_before, to_continue, tries
from aurora_sgl.evaluation.record import record
from aurora_sgl.evaluation.replay import RequestReplay
from aurora_sgl.evaluation.standing import standing_of
from aurora_sgl.rollout import promote, rollback
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation
from aurora_sgl.training.settings import TrainSettings
from tests.support.replays import more, replayed
from tests.support.rollout_house import RolloutHouse

RECIPE = TrainSettings(depth=3, topk=1)


def rows(engine: Engine, version_id: int) -> list[Evaluation]:
    with store.session(engine, write=False) as s:
        return list(queries.evaluations.evaluations(s, version_id))


def test_tries_against_one_live_version_are_one_line(engine: Engine) -> None:
    house = RolloutHouse(engine)
    before = replayed(40, 30)

    def put(version: int, baseline: int, first: int, count: int) -> Evaluation:
        part = before[first : first + count]
        return record(engine, part, more(part, 1), candidate_id=version, baseline_id=baseline,
                      recipe=RECIPE)  # fmt: skip

    first, again = put(house.b, house.a, 0, 20), put(house.b, house.a, 0, 20)
    assert again.id == first.id, "the same requests again are the same try"
    second, third = put(house.b, house.a, 0, 19), put(house.c, house.a, 10, 20)
    assert put(house.c, house.a, 0, 3).attempt is None, "too few to count as a try"
    lines = [e.details["line"] for e in (first, second, third)]
    assert [e.attempt for e in (first, second, third)] == [1, 2, 3]
    assert [line["fresh"] for line in lines] == [20, 0, 10], "a request is evidence once"
    assert lines[1]["log_e"] == lines[0]["log_e"] == lines[2]["log_e_before"] < lines[2]["log_e"]
    promote(engine, house.b, actor="ada", reason="a test")
    new = put(house.c, house.b, 0, 20)
    assert (new.attempt, new.details["line"]["log_e_before"]) == (1, 0.0)
    rollback(engine, "default", actor="ada", reason="a test")
    assert put(house.c, house.a, 20, 20).attempt == 1, "live once more is a new line"


def test_the_row_has_what_repeats_the_comparison(engine: Engine) -> None:
    house = RolloutHouse(engine)
    before = replayed(20, 30) + replayed(10, 20, domain="code", first=100)
    record(engine, before[:9], more(before[:9], 1), candidate_id=house.b, baseline_id=house.a,
           recipe=RECIPE)  # fmt: skip
    row = record(engine, before, more(before, 3), candidate_id=house.b, baseline_id=house.a,
                 recipe=RECIPE)  # fmt: skip
    with store.session(engine, write=False) as s:
        line = line_of([each for each in tries(s, house.a)[1] if each.id < row.id])
    kept = row.details
    again = judge(
        [RequestReplay(r[0], r[3], r[2], r[1], r[6], r[7]) for r in kept["requests"]],
        [RequestReplay(r[0], r[5], r[4], r[1], r[6], r[7]) for r in kept["requests"]],
        line=line,
        standing=standing_of(kept["standing_before"]),
        fewest=kept["fewest"],
        seed=kept["seed"],
        settings=GateSettings(**kept["settings"]),
    )
    assert (again.verdict, again.overall.ci_low) == (row.verdict, row.ci_low)
    assert (again.log_e, again.fresh) == (kept["line"]["log_e"], 21)
    assert {name: each.pooled.chance for name, each in again.strata.items()} == {
        name: each["risk"] for name, each in kept["by_stratum"].items()
    }
    assert (row.depth, row.topk, kept["candidate_sha256"]) == (3, 1, "b" * 64)
    domains = {e.domain: e for e in rows(engine, house.b) if e.domain and e.id > row.id}
    assert {name: e.requests for name, e in domains.items()} == {"chat": 20, "code": 10}
    assert all(e.details["evaluation_id"] == row.id for e in domains.values())


def test_the_next_run_goes_on_from_what_was_not_failed(engine: Engine) -> None:
    house = RolloutHouse(engine)
    before = replayed(20, 30)

    def put(version: int, accepted: int) -> Evaluation:
        return record(engine, before, more(before, accepted), candidate_id=version,
                      baseline_id=house.a, recipe=RECIPE)  # fmt: skip

    def base() -> tuple[int, str]:
        with store.session(engine, write=False) as s:
            return to_continue(s, house.a)

    assert base() == (house.a, "")
    assert put(house.b, 0).details["line"]["continues"] and base() == (house.b, "")
    assert put(house.c, -20).verdict == FAIL and base() == (house.b, "")
    few = record(engine, before[:3], more(before[:3], -20), candidate_id=house.b,
                 baseline_id=house.a, recipe=RECIPE)  # fmt: skip
    assert few.attempt is None and base() == (house.b, ""), "three requests say nothing"
    later = replayed(20, 30, first=50)
    again = record(engine, later, more(later, -20), candidate_id=house.b, baseline_id=house.a,
                   recipe=RECIPE)  # fmt: skip
    assert again.verdict == FAIL and base() == (house.a, ""), "the newest judgement counts"
    with store.session(engine) as s:
        s.delete(s.get_one(Evaluation, again.id))
    with store.session(engine) as s:
        queries.versions.version(s, house.b).pruned_at = utc_now()
    number, why = base()
    assert number == house.a and "has no weights any more" in why


def test_a_line_and_a_mark_of_a_store_from_before_are_empty(engine: Engine) -> None:
    house = RolloutHouse(engine)
    with store.session(engine) as s:
        old = queries.evaluations.add_evaluation(
            s, candidate_id=house.b, baseline_id=house.a, kind="replay", requests=9,
            verdict="pass", attempt=2, alpha=0.01, details={"requests": [[1, "chat", 1, 2, 1, 2]]},
        )  # fmt: skip
    promote(engine, house.b, actor="ada", reason="a test", evaluation_id=old.id)
    with store.session(engine, write=False) as s:
        assert line_of(tries(s, house.a)[1]).tries == 0 and to_continue(s, house.a)[0] == house.a
        assert standing_before(s, house.b) == {}


def test_levels_are_kept_along_promotions_and_fall_back_with_them(engine: Engine) -> None:
    house = RolloutHouse(engine)
    before = replayed(60, 30) + replayed(60, 30, domain="code", first=100)
    after = more(before[:60], 6) + more(before[60:], -3)
    row = record(engine, before, after, candidate_id=house.b, baseline_id=house.a, recipe=RECIPE)
    assert row.verdict == "pass"
    promote(engine, house.b, actor="ada", reason="a test", evaluation_id=row.id)
    with store.session(engine, write=False) as s:
        standing = standing_before(s, house.b)
        assert -0.05 < standing["all/code"].level < 0 == standing["all/chat"].level
        assert standing_before(s, house.a) == {}
    again = record(engine, before, after, candidate_id=house.c, baseline_id=house.b, recipe=RECIPE)
    assert again.verdict == "inconclusive" and "earlier versions reached in code" in str(
        again.details["reason"]
    )
