"""Promote and roll back, on both databases."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.rollout import Change, pin, promote, rollback, unpin
from aurora_sgl.rollout.promote import NONE_LIVE, set_candidate
from aurora_sgl.rollout.versions import list_versions, resolve_version
from aurora_sgl.store import queries
from tests.support import store_samples as samples


@pytest.fixture
def versions(engine: Engine) -> list[int]:
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        return [samples.add_version(s, group.id, letter) for letter in "abcd"]


def state(engine: Engine) -> tuple[dict[str, int], int, int]:
    """Aliases, generation, deployments."""
    with store.session(engine, write=False) as s:
        group = queries.groups.group_by_name(s, "default")
        return (
            queries.aliases.aliases(s, group.id),
            group.generation,
            len(queries.deployments.deployments(s, group.id)),
        )


def go(engine: Engine, version_id: int) -> Change:
    return promote(engine, version_id, actor="ada", reason="better on replay")


def test_a_promotion_moves_the_aliases_and_appends_a_row(
    engine: Engine, versions: list[int]
) -> None:
    a, b, *_ = versions
    first = promote(engine, a, actor="ada", reason="first", expected_live=NONE_LIVE)
    assert (first.changed, first.generation, first.previous_version_id) == (True, 1, None)
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, "default").id
    set_candidate(engine, b, group_id)
    second = promote(
        engine, b, actor=" ada ", reason="better", expected_live=a, evidence={"difference": 0.1}
    )
    assert second.before == {"live": a, "candidate": b}
    assert second.after == {"live": b, "previous": a}
    assert state(engine) == ({"live": b, "previous": a}, 2, 2)
    with store.session(engine, write=False) as s:
        assert queries.aliases.desired_version(s, group_id) == (b, 2)
        row = queries.deployments.deployments(s, group_id)[0]
        assert (row.actor, row.reason, row.action) == ("ada", "better", "promote")
        assert (row.before, row.after) == (second.before, second.after)
        assert row.evidence == {"difference": 0.1}


def test_a_wrong_expectation_is_refused_with_both_names(
    engine: Engine, versions: list[int]
) -> None:
    a, b, c, _ = versions
    go(engine, a)
    before = state(engine)
    with pytest.raises(Refused, match=rf"expected version {b} to be live, but version {a} is"):
        promote(engine, c, actor="ada", reason="x", expected_live=b)
    with pytest.raises(Refused, match=rf"expected no version to be live, but version {a} is"):
        promote(engine, c, actor="ada", reason="x", expected_live=NONE_LIVE)
    with pytest.raises(Refused, match=rf"expected version {b} to be live, but version {a} is"):
        rollback(engine, "default", actor="ada", reason="x", expected_live=b, to=c)
    assert state(engine) == before


def test_a_dry_run_says_what_would_be_and_changes_nothing(
    engine: Engine, versions: list[int]
) -> None:
    a, b, *_ = versions
    go(engine, a)
    go(engine, b)
    before = state(engine)
    would = promote(engine, a, actor="ada", reason="x", dry_run=True)
    assert (would.dry_run, would.changed, would.generation) == (True, True, 3)
    assert would.after == {"live": a, "previous": b}
    back = rollback(engine, "default", actor="ada", reason="x", dry_run=True)
    assert (back.version_id, back.after) == (a, {"live": a})
    assert state(engine) == before
    with pytest.raises(Refused):
        promote(engine, a, actor="ada", reason="x", expected_live=a, dry_run=True)


def test_promoting_what_is_live_changes_nothing(engine: Engine, versions: list[int]) -> None:
    go(engine, versions[0])
    before = state(engine)
    again = go(engine, versions[0])
    assert (again.changed, again.generation) == (False, 1)
    assert state(engine) == before


@pytest.mark.parametrize(("actor", "reason"), [("", "why"), ("  ", "why"), ("ada", ""), ("a", " ")])
def test_nobody_and_no_reason_are_refused(
    engine: Engine, versions: list[int], actor: str, reason: str
) -> None:
    with pytest.raises(AuroraError, match=r"actor|reason"):
        promote(engine, versions[0], actor=actor, reason=reason)
    with pytest.raises(AuroraError, match=r"actor|reason"):
        rollback(engine, "default", actor=actor, reason=reason)
    assert state(engine) == ({}, 0, 0)


def test_an_unknown_version_is_named(engine: Engine, versions: list[int]) -> None:
    with pytest.raises(AuroraError, match="no drafter version 999"):
        go(engine, 999)


def test_a_pruned_version_is_refused_and_nothing_changes(
    engine: Engine, versions: list[int]
) -> None:
    a, b, *_ = versions
    go(engine, a)
    go(engine, b)
    before = state(engine)
    with store.session(engine) as s:
        queries.versions.set_pruned(s, a)
    with pytest.raises(Refused, match=f"weights of version {a} were deleted on"):
        go(engine, a)
    with pytest.raises(Refused, match=f"weights of version {a} were deleted on"):
        rollback(engine, "default", actor="ada", reason="back")
    assert state(engine) == before


def test_a_version_of_another_target_is_refused_by_name_even_with_force(
    engine: Engine, versions: list[int]
) -> None:
    go(engine, versions[0])
    with store.session(engine) as s:
        group_id = queries.groups.group_by_name(s, "default").id
        other = samples.add_version(s, group_id, "e", target_model="another", target_revision="r2")
    with pytest.raises(Refused, match=r"made for another r2, group 'default' serves target"):
        promote(engine, other, actor="ada", reason="why not", force=True)
    assert state(engine) == ({"live": versions[0]}, 1, 1)


def test_a_rollback_goes_back_step_by_step_and_never_forth(
    engine: Engine, versions: list[int]
) -> None:
    a, b, c, _ = versions
    for version in (a, b, c):
        go(engine, version)
    back = rollback(engine, "default", actor="watch", reason="worse", expected_live=c)
    assert (back.version_id, back.previous_version_id, back.generation) == (b, c, 4)
    assert state(engine)[0] == {"live": b, "previous": a}
    again = rollback(engine, "default", actor="watch", reason="worse", expected_live=c)
    assert (again.changed, again.version_id) == (False, b)
    assert state(engine)[1:] == (4, 4)
    rollback(engine, "default", actor="watch", reason="worse still")
    assert state(engine)[0] == {"live": a}
    with pytest.raises(Refused, match="nothing to roll back to"):
        rollback(engine, "default", actor="watch", reason="and more")


def test_a_rollback_can_name_an_earlier_version_but_no_new_one(
    engine: Engine, versions: list[int]
) -> None:
    a, b, c, d = versions
    for version in (a, b, c):
        go(engine, version)
    with pytest.raises(Refused, match="never live"):
        rollback(engine, "default", actor="ada", reason="x", to=d)
    assert rollback(engine, "default", actor="ada", reason="x", to=a).version_id == a
    assert state(engine)[0] == {"live": a}


def test_with_nothing_live_there_is_nothing_to_roll_back(
    engine: Engine, versions: list[int]
) -> None:
    with pytest.raises(Refused, match="nothing is live"):
        rollback(engine, "default", actor="ada", reason="x")


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_verdict_that_is_not_pass_needs_a_person(
    engine: Engine, versions: list[int], verdict: str
) -> None:
    a, b, *_ = versions
    go(engine, a)
    with store.session(engine) as s:
        row = queries.evaluations.add_evaluation(
            s, candidate_id=b, baseline_id=a, kind="replay", requests=5, verdict=verdict
        )
    for force in (False, True):
        if not force:
            with pytest.raises(Refused, match=verdict):
                promote(engine, b, actor="system", reason="x", evaluation_id=row.id)
        else:
            promote(engine, b, actor="ada", reason="x", evaluation_id=row.id, force=True)
    with pytest.raises(Refused, match="not of version"):
        promote(engine, versions[2], actor="system", reason="x", evaluation_id=row.id)
    with store.session(engine, write=False) as s:
        assert queries.deployments.deployments(s, 1)[0].evaluation_id == row.id


def test_of_promotions_at_once_with_one_expectation_one_wins(
    engine: Engine, versions: list[int]
) -> None:
    a, *rest = versions
    go(engine, a)
    barrier = threading.Barrier(len(rest))
    won: list[int] = []
    refused: list[str] = []

    def one(version: int) -> None:
        barrier.wait()
        try:
            promote(engine, version, actor="ada", reason="race", expected_live=a)
            won.append(version)
        except Refused as error:
            refused.append(str(error))

    threads = [threading.Thread(target=one, args=(version,)) for version in rest]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 2)
    assert state(engine) == ({"live": won[0], "previous": a}, 2, 2)


def test_a_version_is_found_by_id_alias_and_hash(engine: Engine, versions: list[int]) -> None:
    go(engine, versions[1])
    for name in (str(versions[1]), "live", "bbbbbb", "BBBBBBBB"):
        assert resolve_version(engine, "default", name) == versions[1]
    for name in ("candidate", "bbb", "ffffff", "99"):
        with pytest.raises(AuroraError, match="versions list"):
            resolve_version(engine, "default", name)


def test_the_list_shows_aliases_and_pins(engine: Engine, versions: list[int]) -> None:
    go(engine, versions[0])
    go(engine, versions[1])
    assert pin(engine, versions[0], actor="ada", reason="known good").pinned
    lines = list_versions(engine, "default")
    assert [line.aliases for line in lines] == [("previous",), ("live",), (), ()]
    assert [line.version.pinned for line in lines] == [True, False, False, False]
    assert not unpin(engine, versions[0], actor="ada", reason="old").pinned
