"""A candidate that waits for evidence is judged again by what was served since it was trained."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update

from aurora_sgl import store, wire
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.rollout.promote import promote
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.scheduler import candidate
from aurora_sgl.sequences.splits import sides, split_of
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation, Request, TrainingRequest
from aurora_sgl.training import run_data, selection
from aurora_sgl.training.run import Outcome, train_once
from tests.unit.training.test_run import BRIEF, SETTINGS, House
from tests.unit.training.test_run import house as house


def run(house: House, settings: Any = BRIEF, **more: Any) -> Outcome:
    return train_once(
        house.engine, house.artifacts, "default", settings, trigger="requests", **more
    )


def on_few(house: House, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A good candidate, of which four held-out requests can prove nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(run_data, "HELD_OUT", 4)
        outcome = run(house, SETTINGS)
    assert (outcome.verdict, outcome.metrics["gate_requests"]) == ("inconclusive", 4)
    return outcome


def unlearnt(s: Any) -> list[Any]:
    return queries.training_requests.never_learnt(
        s, 1, selection.select(s, 1, SETTINGS).open_to_all
    )


def judged(house: House, outcome: Outcome) -> Evaluation:
    with store.session(house.engine, write=False) as s:
        return s.get_one(Evaluation, outcome.evaluation_id)


def test_a_candidate_passes_by_what_came_since_before_anything_is_trained(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.serve(40)
    first = on_few(house, monkeypatch)
    house.serve(70, first=40)
    events: list[dict[str, Any]] = []
    again = run(house, carry_on=True, progress=events.append)
    assert (again.status, again.verdict, again.version_id) == ("skipped", "pass", first.version_id)
    assert {event["event"] for event in events} == {"second_look"}
    row = judged(house, again)
    assert [event["done"] for event in events] == [*range(len(row.details["requests"]) + 1)]
    assert row.attempt == 2 and row.details["again"] and row.details["line"]["log_e_before"] > 0
    ids = {request[0] for request in row.details["requests"]}
    late = {wire.request_id(7, n + 1) for n in range(40, 70)}
    trained_side = [n for n in range(40, 70)
                    if split_of(f"c{n}", dev_share=0.1, gate_share=0.3) == "train"]  # fmt: skip
    assert ids & {wire.request_id(7, n + 1) for n in trained_side}, "not the held-out ones alone"
    with store.session(house.engine, write=False) as s:
        learnt = set(s.scalars(select(TrainingRequest.request_id)))
        waiting = candidate.pending(house.engine, 1, with_trial=False)
    assert ids & late and not ids & learnt and not late & learnt
    assert waiting is not None and waiting.id == again.evaluation_id, "the scheduler promotes it"
    last = house.runs()[-1]
    assert last.status == "skipped" and last.error.endswith("nothing was trained")
    assert f"version {first.version_id}, judged again by what was served since" in last.error

    # A pass that waits for a person does not keep the loop from learning.
    house.serve(110, first=70)
    assert run(house, carry_on=True).status == "succeeded"
    assert house.runs()[-1].base_version_id == first.version_id


def test_a_candidate_that_turns_out_worse_is_not_gone_on_from(house: House) -> None:
    house.serve(60)
    good = run(house, SETTINGS)
    promote(house.engine, good.version_id, actor="test", reason="better")
    folder = checkpoint.save(
        scratch.make(house.target, draft_vocab_size=40, seed=3, model=str(house.target)),
        house.home / "worse",
    )
    worse = import_version(house.engine, house.artifacts, folder, "default", source="import")
    with store.session(house.engine) as s:
        queries.evaluations.add_evaluation(
            s, candidate_id=worse.id, baseline_id=good.version_id, kind="replay", requests=9,
            verdict="inconclusive", attempt=1,
            details={"line": {"generation": 2, "log_e": 0.0, "continues": True}},
        )  # fmt: skip
    house.serve(90, first=60)
    outcome = run(house, carry_on=True)
    assert outcome.status == "succeeded" and house.runs()[-1].base_version_id == good.version_id
    assert f"version {worse.id}, judged again, is not worth" in outcome.metrics["base_left"]
    with store.session(house.engine, write=False) as s:
        verdicts = [row.verdict for row in queries.evaluations.evaluations(s, worse.id)
                    if not row.domain]  # fmt: skip
    assert verdicts == ["fail", "inconclusive"]
    # The older, kinder judgement is not gone by any more.
    assert run(house, carry_on=True).status == "succeeded"
    assert house.runs()[-1].base_version_id != worse.id


def test_without_enough_that_is_new_no_second_look_is_taken(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.serve(40)
    first = on_few(house, monkeypatch)
    monkeypatch.setattr(run_data, "HELD_OUT", 4)  # the same four, and nothing came since
    events: list[dict[str, Any]] = []
    outcome = run(house, carry_on=True, progress=events.append)
    assert outcome.status == "succeeded"
    assert "second_look" not in {event["event"] for event in events}, "nothing is replayed for it"
    with store.session(house.engine, write=False) as s:
        rows = queries.evaluations.evaluations(s, int(first.version_id or 0))
    assert [row.attempt for row in rows if not row.domain] == [1]


def test_a_conversation_that_was_learnt_from_judges_nothing_later(house: House) -> None:
    """A later turn repeats what was trained on, however new its own answer is."""
    house.serve(40)
    run(house)
    house.serve(70, first=40)
    with store.session(house.engine) as s:
        rows = unlearnt(s)
        learnt = s.scalars(
            select(Request.conversation_hash)
            .join(TrainingRequest, TrainingRequest.request_id == Request.id)
            .distinct()
        ).all()
        late = rows[0].request_id
        s.execute(update(Request).where(Request.id == late).values(conversation_hash=learnt[0]))
        s.flush()
        left = unlearnt(s)
    newest = [wire.request_id(7, n + 1) for n in range(40, 70)]
    assert {row.request_id for row in rows} <= set(newest) and len(rows) > 10
    assert {row.request_id for row in rows} - {row.request_id for row in left} == {late}


@pytest.mark.parametrize("rule", ["block_verification", "", "mixed"])
def test_what_replay_does_not_cover_judges_nothing_either(house: House, rule: str) -> None:
    house.serve(30)
    run(house)
    house.rule_of = lambda number: rule
    house.serve(60, first=30)
    with store.session(house.engine, write=False) as s:
        assert unlearnt(s) == []


def test_an_unlearnt_request_changes_no_others_side(house: House) -> None:
    house.serve(60)
    with store.session(house.engine, write=False) as s:
        rows = queries.requests.recent_requests(s, 1)
    shares = {"dev_share": 0.1, "gate_share": 0.3}
    alike = {row.request_id: f"prompt {n % 20}" for n, row in enumerate(rows[:40])}
    late = {row.request_id for row in rows[:20]}
    trained = [rows[30].request_id]
    alone = sides(rows[20:], alike, **shares, trained=trained)
    together = sides(rows, alike, **shares, trained=trained, unlearnt=late)
    assert {one: together[one] for one in alone} == alone
    repeats = {one for one in late if alike[one] == alike[trained[0]]}
    assert {one for one in late if together[one] == "duplicate"} == repeats != set()
    assert {one for one in late if together[one] == "gate"} == late - repeats
