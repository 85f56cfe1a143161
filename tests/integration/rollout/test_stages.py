"""Staged rollouts and freezes: who runs what, how a stage is judged and ends, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import SchedulerSettings, TrialSettings, WatchSettings
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.rollout import alerts, freezes, promote, rollback, stages, status, switches, trial
from aurora_sgl.rollout.stages import chosen_servers
from aurora_sgl.rollout.switches import AUTO_PROMOTE
from aurora_sgl.scheduler import candidate
from aurora_sgl.store import queries
from aurora_sgl.store.models import Server
from aurora_sgl.store.pruning.weights import unused
from tests.support import store_samples as samples
from tests.support.rollout_house import RolloutHouse

RULES = WatchSettings(windows=2, requests=6, steps=200, seconds=120)
WHO = {"actor": "ada", "reason": "one server first"}


class StagedHouse(RolloutHouse):
    """Three servers, h0, h1 and h2, all on version a."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.boots = [self.boot_id, *(self.boot_id + n for n in (1, 2))]
        self._sequences = [self._sequence, itertools.count(1), itertools.count(1)]
        self.ids = [self.server_id]
        with store.session(engine) as s:
            s.get_one(Server, self.server_id).name = "h0"
            for number in (1, 2):
                row = queries.servers.register_server(
                    s, self.group_id, samples.hello(self.boots[number])
                )
                row.name = f"h{number}"
                self.ids.append(row.id)
                queries.servers.touch_server(
                    s, row.id, boot_version_id=self.a, live_version_id=self.a,
                    phase="speculating", speculation_share=1.0,
                )  # fmt: skip

    def at(self, number: int) -> None:
        """What is served or followed next is of this server."""
        self.boot_id, self.server_id = self.boots[number], self.ids[number]
        self._sequence = self._sequences[number]

    def runs(self, number: int, version_id: int) -> None:
        self.at(number)
        self.follow(version_id)

    def hear(self) -> None:
        """All servers say that they are there."""
        with store.session(self.engine) as s:
            for server_id in self.ids:
                s.get_one(Server, server_id).last_seen_at = utc_now()

    def wanted(self) -> list[int | None]:
        with store.session(self.engine, write=False) as s:
            found = [queries.aliases.wanted_by_server(s, server_id) for server_id in self.ids]
        return [one.version_id if one else None for one in found]

    def live(self) -> int:
        with store.session(self.engine, write=False) as s:
            return queries.aliases.aliases(s, self.group_id)["live"]

    def audit(self) -> list[str]:
        return [row.action for row in status.audit(self.engine, "default")][::-1]

    def stage(self, version_id: int, servers: str = "1", *, goes_on: bool = False) -> None:
        stages.start(self.engine, version_id, servers, settings=RULES, goes_on=goes_on, **WHO)

    def traffic(self, rates: Sequence[float], versions: Sequence[int], seed: int) -> datetime:
        """Two windows of requests on each server at the same time; when the last one ended."""
        begin = utc_now() + timedelta(seconds=1)
        ends = []
        for number, (rate, version) in enumerate(zip(rates, versions, strict=True)):
            self.at(number)
            ends.append(self.serve(version, rate, since=begin, requests=14, seed=seed + number))
        return max(ends)

    def judge(self, after: datetime) -> stages.StageStatus:
        self.hear()
        looked = stages.tick(self.engine, self.group_id, now=after + timedelta(seconds=1))
        assert looked is not None
        return looked


@pytest.fixture
def house(engine: Engine) -> StagedHouse:
    return StagedHouse(engine)


def test_only_the_servers_of_a_stage_run_its_version_and_all_do_once_it_goes_on(
    house: StagedHouse,
) -> None:
    assert house.wanted() == [house.a] * 3
    house.stage(house.b)
    assert house.wanted() == [house.b, house.a, house.a] and house.live() == house.a
    looked = {one.name: one for one in status.look(house.engine, "default").servers}
    assert [looked[f"h{n}"].wanted_version_id for n in range(3)] == house.wanted()
    assert [looked[f"h{n}"].converged for n in range(3)] == [False, True, True]
    house.hear()
    on_its_way = stages.tick(house.engine, house.group_id)
    assert on_its_way is not None and on_its_way.sentence == "it is on its way to h0"
    house.runs(0, house.b)
    house.hear()
    there = stages.tick(house.engine, house.group_id)
    assert there is not None and there.sentence == "0 of 2 windows are over"
    after = house.traffic((0.7, 0.7, 0.7), (house.b, house.a, house.a), seed=1)
    passed = house.judge(after)
    assert (passed.stage.status, passed.is_open) == ("passed", True), passed.sentence
    assert house.wanted() == [house.b, house.a, house.a], "it waits for somebody"
    with store.session(house.engine, write=False) as s:
        (evaluation,) = queries.evaluations.evaluations(s, house.b)
    assert (evaluation.kind, evaluation.verdict) == ("live", "pass")
    assert evaluation.details["servers"] == ["h0"]
    change = stages.go_on(house.engine, "default", **WHO)
    assert (change.version_id, change.previous_version_id) == (house.b, house.a)
    assert house.wanted() == [house.b] * 3
    deployed = status.look(house.engine, "default")
    assert deployed.stage is not None and deployed.stage.stage.status == "continued"
    assert deployed.watch is not None and deployed.watch.watch.status == "running"
    assert house.audit() == ["stage_start", "stage_pass", "stage_continue"]
    with store.session(house.engine, write=False) as s:
        newest = queries.deployments.deployments(s, house.group_id, limit=1)[0]
    assert newest.evidence["servers"] == ["h0"] and len(newest.evidence["windows"]) == 2


def test_a_damaged_version_goes_back_and_never_reaches_the_others(house: StagedHouse) -> None:
    house.stage(house.b, goes_on=True)
    house.runs(0, house.b)
    after = house.traffic((0.1, 0.7, 0.7), (house.b, house.a, house.a), seed=2)
    failed = house.judge(after)
    assert (failed.stage.status, failed.is_open) == ("failed", False)
    assert "worse beyond doubt" in failed.stage.outcome
    assert house.wanted() == [house.a] * 3 and house.live() == house.a
    assert stages.tick(house.engine, house.group_id) is None
    with pytest.raises(Refused, match="taken back by its stage"):
        promote(house.engine, house.b, **WHO)
    with pytest.raises(Refused, match="taken back by its stage"):
        house.stage(house.b)
    kinds = [one.kind for one in alerts.alerts(house.engine, status.look(house.engine, "default"))]
    assert "stage_failed" in kinds
    assert house.audit() == ["stage_start", "stage_fail"]


def test_it_is_judged_against_what_the_others_serve_meanwhile_not_against_yesterday(
    house: StagedHouse,
) -> None:
    """Traffic got harder for all: the version before had accepted much more until now."""
    house.at(0)
    house.serve(house.a, 0.8, since=utc_now() - timedelta(hours=1), requests=40, seed=3)
    house.stage(house.b)
    house.runs(0, house.b)
    after = house.traffic((0.4, 0.4, 0.4), (house.b, house.a, house.a), seed=4)
    assert house.judge(after).stage.status == "passed"


def test_what_the_others_do_not_serve_is_no_proof(house: StagedHouse) -> None:
    house.stage(house.b)
    house.runs(0, house.b)
    begin = utc_now() + timedelta(seconds=1)
    house.at(0)
    after = house.serve(house.b, 0.7, since=begin, requests=14, domain="code", seed=5)
    waiting = house.judge(after)
    assert waiting.stage.status == "running" and not waiting.stage.windows
    late = house.judge(after + timedelta(seconds=2 * RULES.seconds))
    assert [one["verdict"] for one in late.stage.windows][:1] == ["empty"]
    assert late.stage.status != "passed"


def test_servers_that_leave_drafts_out_because_of_it_are_no_lack_of_traffic(
    house: StagedHouse,
) -> None:
    house.stage(house.b)
    house.runs(0, house.b)
    with store.session(house.engine) as s:
        queries.servers.touch_server(s, house.ids[0], phase="off", speculation_share=0.0)
    house.at(1)
    after = house.serve(house.a, 0.7, since=utc_now() + timedelta(seconds=1), requests=3, seed=8)
    assert house.judge(after).stage.status == "running"
    house.serve(house.a, 0.7, since=after + timedelta(seconds=RULES.seconds), requests=3, seed=9)
    failed = house.judge(after + timedelta(seconds=3 * RULES.seconds))
    assert failed.stage.status == "failed"
    assert [one["verdict"] for one in failed.stage.windows] == ["empty"] * 2


def test_one_that_goes_on_by_itself_waits_for_the_switch_and_the_end_of_a_freeze(
    house: StagedHouse,
) -> None:
    house.stage(house.b, goes_on=True)
    house.runs(0, house.b)
    switches.turn(house.engine, "default", AUTO_PROMOTE, False, **WHO)
    now = utc_now()
    frozen = freezes.add(
        house.engine, "default", starts_at=now, ends_at=now + timedelta(hours=1), **WHO
    )
    after = house.traffic((0.7, 0.7, 0.7), (house.b, house.a, house.a), seed=6)
    assert house.judge(after).stage.status == "passed"
    switches.turn(house.engine, "default", AUTO_PROMOTE, True, **WHO)
    assert house.judge(after).stage.status == "passed" and house.live() == house.a
    kinds = [one.kind for one in alerts.alerts(house.engine, status.look(house.engine, "default"))]
    assert "stage_waiting" in kinds
    freezes.lift(house.engine, "default", frozen.id, **WHO)
    assert house.judge(after).stage.status == "continued" and house.live() == house.b


def test_an_abort_and_a_rollback_take_it_back_everywhere(house: StagedHouse) -> None:
    house.stage(house.b, "2")
    assert house.wanted() == [house.b, house.b, house.a]
    planned = stages.abort(house.engine, "default", dry_run=True, **WHO)
    assert planned.is_open and house.wanted()[0] == house.b
    assert stages.abort(house.engine, "default", **WHO).stage.status == "aborted"
    assert house.wanted() == [house.a] * 3
    with pytest.raises(Refused, match="no staged rollout is open"):
        stages.abort(house.engine, "default", **WHO)
    promote(house.engine, house.b, force=True, **WHO)
    stages.start(house.engine, house.c, "h2", force=True, settings=RULES, **WHO)
    assert house.wanted() == [house.b, house.b, house.c]
    rollback(house.engine, "default", **WHO)
    assert house.wanted() == [house.a] * 3
    assert [action for action in house.audit() if action == "stage_abort"] == ["stage_abort"] * 2


def test_a_server_that_never_gets_the_version_is_told_and_fails_the_stage(
    house: StagedHouse,
) -> None:
    house.stage(house.b)
    with store.session(house.engine) as s:
        queries.servers.touch_server(s, house.ids[0], last_error="the weights do not fit")
    waiting = house.judge(utc_now())
    assert waiting.stage.status == "running" and "h0: the weights do not fit" in waiting.sentence
    failed = house.judge(utc_now() + timedelta(seconds=stages.ARRIVE_SECONDS))
    assert failed.stage.status == "failed" and "the weights do not fit" in failed.stage.outcome
    assert house.wanted() == [house.a] * 3


def test_without_a_server_of_the_stage_it_says_so(house: StagedHouse) -> None:
    house.stage(house.b)
    with store.session(house.engine) as s:
        s.get_one(Server, house.ids[0]).last_seen_at = utc_now() - timedelta(minutes=5)
    looked = stages.tick(house.engine, house.group_id)
    assert looked is not None and "no server of the stage (h0) is heard of" in looked.sentence


def test_a_server_that_starts_again_under_its_name_is_still_of_the_stage(
    house: StagedHouse,
) -> None:
    house.stage(house.b)
    with store.session(house.engine) as s:
        again = queries.servers.register_server(
            s, house.group_id, samples.hello(house.boots[0] + 9)
        )
        again.name = "h0"
        assert queries.aliases.wanted_by_server(s, again.id).version_id == house.b  # type: ignore[union-attr]


def test_what_is_staged_keeps_its_weights_and_nothing_else_is_begun(house: StagedHouse) -> None:
    with pytest.raises(Refused, match="is live already"):
        house.stage(house.a)
    house.stage(house.b)
    with store.session(house.engine, write=False) as s:
        gone = {row.id for row in s.scalars(unused(house.group_id, 0))}
    assert gone == {house.c}
    with pytest.raises(Refused, match="is staged on h0"):
        house.stage(house.c)
    with pytest.raises(Refused, match="is staged on h0"):
        trial.start(house.engine, house.c, **WHO)
    with pytest.raises(Refused, match="is staged on h0 and not judged"):
        promote(house.engine, house.c, **WHO)
    with pytest.raises(Refused, match="is not judged yet on h0"):
        stages.go_on(house.engine, "default", **WHO)
    stages.go_on(house.engine, "default", force=True, **WHO)
    assert house.live() == house.b


def test_a_trial_that_runs_and_a_watch_are_not_disturbed(house: StagedHouse) -> None:
    promote(house.engine, house.b, force=True, **WHO)
    with pytest.raises(Refused, match="is being watched"):
        house.stage(house.c)
    with store.session(house.engine) as s:
        watch = queries.watches.running_watch(s, house.group_id)
        assert watch is not None
        queries.watches.end_watch(s, watch, "passed", "")
    trial.start(house.engine, house.c, settings=TrialSettings(), **WHO)
    with pytest.raises(Refused, match="trial"):
        house.stage(house.c)


def test_the_scheduler_stages_what_passed_the_gate_and_leaves_what_was_aborted(
    house: StagedHouse,
) -> None:
    with store.session(house.engine) as s:
        passed = queries.evaluations.add_evaluation(
            s, candidate_id=house.b, baseline_id=house.a, kind="replay", requests=20,
            verdict="pass", candidate_accept_length=2.2, baseline_accept_length=2.0,
            difference=0.2,
        )  # fmt: skip

    def carry_on(stage: str) -> str:
        return candidate.carry_on(
            house.engine, house.group_id, passed, rules=SchedulerSettings(stage=stage),
            trials=TrialSettings(), watching=RULES, resting=False,
        ).reason  # fmt: skip

    now = utc_now()
    frozen = freezes.add(
        house.engine, "default", starts_at=now, ends_at=now + timedelta(hours=1), **WHO
    )
    assert "frozen until" in carry_on("1") and house.wanted() == [house.a] * 3
    freezes.lift(house.engine, "default", frozen.id, **WHO)
    assert carry_on("1") == "it has begun on h0"
    assert house.wanted() == [house.b, house.a, house.a]
    assert carry_on("1") == f"version {house.b} is on h0 first"
    stages.abort(house.engine, "default", **WHO)
    assert "its stage was aborted" in carry_on("1") and house.wanted() == [house.a] * 3


def test_a_freeze_holds_off_what_goes_live_by_itself_and_nobody_in_person(
    house: StagedHouse,
) -> None:
    now = utc_now()
    for begin, end, why in (
        (now, now, "must end after it begins"),
        (now - timedelta(hours=2), now - timedelta(hours=1), "would be over already"),
    ):
        with pytest.raises(AuroraError, match=why):
            freezes.add(house.engine, "default", starts_at=begin, ends_at=end, **WHO)
    with pytest.raises(AuroraError, match="an actor and a reason"):
        freezes.add(house.engine, "default", starts_at=now, ends_at=now + timedelta(1), actor="",
                    reason="x")  # fmt: skip
    later = freezes.add(
        house.engine, "default", starts_at=now + timedelta(hours=1),
        ends_at=now + timedelta(hours=2), **WHO,
    )  # fmt: skip
    assert freezes.current(house.engine, "default") is None
    running = freezes.add(
        house.engine, "default", starts_at=now, ends_at=now + timedelta(hours=1), **WHO
    )
    with pytest.raises(Refused, match=r"frozen until .* by ada: one server first"):
        promote(house.engine, house.b, only_if_on=AUTO_PROMOTE, **WHO)
    look = status.look(house.engine, "default")
    assert look.freeze is not None and look.freeze.id == running.id
    promote(house.engine, house.b, **WHO)
    assert house.live() == house.b
    freezes.lift(house.engine, "default", later.id, **WHO)
    with pytest.raises(AuroraError, match="was lifted before, by ada"):
        freezes.lift(house.engine, "default", later.id, **WHO)
    with pytest.raises(AuroraError, match="there is no freeze 99"):
        freezes.lift(house.engine, "default", 99, **WHO)
    assert house.audit() == ["freeze", "freeze", "lift"]


def servers_of(names: Sequence[str]) -> list[Server]:
    return [Server(name=name, phase="speculating") for name in names]


@given(count=st.integers(2, 30), asked=st.integers(0, 40), percent=st.integers(0, 120))
def test_a_number_and_a_share_leave_one_to_compare_with(
    count: int, asked: int, percent: int
) -> None:
    rows = servers_of([f"server-{n:02}" for n in range(count)])
    if 1 <= asked < count:
        assert chosen_servers(str(asked), rows) == [f"server-{n:02}" for n in range(asked)]
    else:
        with pytest.raises(AuroraError):
            chosen_servers(str(asked), rows)
    share = -(-count * percent // 100)
    if percent <= 100 and 1 <= share < count:
        assert len(chosen_servers(f"{percent}%", rows)) == share
    else:
        with pytest.raises(AuroraError):
            chosen_servers(f"{percent}%", rows)


@pytest.mark.parametrize(
    "asked", ["", " ", ",", "h9", "h0,h9", "-1", "1.5", "%", "x%", "1e9", "\uff19"]
)
def test_what_is_no_choice_of_servers_is_refused_in_a_line(asked: str) -> None:
    with pytest.raises(AuroraError) as refusal:
        chosen_servers(asked, servers_of(["h0", "h1", "h2"]))
    assert "\n" not in str(refusal.value)


def test_servers_by_name_and_those_that_draft_first() -> None:
    rows = servers_of(["h0", "h1", "7"])
    rows[0].phase = "off"
    assert chosen_servers("1", rows) == ["7"]
    assert chosen_servers("h1, h0", rows) == ["h1", "h0"]
    assert chosen_servers("7", rows) == ["7"], "a server's name before a number"
