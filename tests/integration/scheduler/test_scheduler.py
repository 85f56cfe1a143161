"""The scheduler on real databases, with real processes and a real (tiny) drafter that learns."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import Engine, select

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.config import SchedulerSettings, TrialSettings, WatchSettings
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.rollout import promote, status, switches
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.scheduler.elapsed import Elapsed
from aurora_sgl.scheduler.lease import Leadership
from aurora_sgl.scheduler.loop import Scheduler
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.liveness import scheduler_lease_name, training_lease_name
from aurora_sgl.store.models import Request
from tests.pages.test_pages import draw, said
from tests.support import store_samples as samples
from tests.support.drafter_cases import RECIPE, target_folder
from tests.support.rollout_house import RolloutHouse
from tests.support.sidecar_engine import wait_until
from tests.support.traces import add_trace
from tests.unit.training.test_run import House

#: The scheduler's own behaviour; what it asks of the store is tried on both databases elsewhere.
ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)

FAST = {"threads": 1, "nice": 0, "gate_share": 0.3, **RECIPE}
RULES = SchedulerSettings(
    minutes=0, requests=20, min_new_requests=8, cooldown_minutes=0, port=-1, lease_seconds=3
)


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


@pytest.fixture
def house(home: Path, engine: Engine) -> House:
    """An untrained drafter is live, for a target whose text can be learned."""
    target = target_folder(home / "target")
    artifacts = ArtifactRoot(str(home / "artifacts"))
    drafter = scratch.make(target, draft_vocab_size=40, seed=1, model=str(target))
    folder = checkpoint.save(drafter, home / "scratch")
    with store.session(engine) as s:
        queries.groups.ensure_group(s, "default", str(target), "", drafter.config.architecture)
    version = import_version(engine, artifacts, folder, "default", source="scratch")
    promote(engine, version.id, actor="test", reason="first")
    return House(home, engine, artifacts, target, version.id)


def scheduler(engine: Engine, rules: SchedulerSettings = RULES, **kw: Any) -> Scheduler:
    return Scheduler(StoreLink(url_of(engine)), "default", rules, recipe=FAST, **kw)


def rounds(one: Scheduler, until: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Rounds of the scheduler, a little faster than in life, until something is so."""

    def done() -> Any:
        one.look_now()
        one.tick()
        return until()

    return wait_until(done, seconds, "what the scheduler should do", pause=0.25)


@pytest.fixture
def closing() -> Iterator[list[Scheduler]]:
    found: list[Scheduler] = []
    yield found
    for one in found:
        one.close()


# -- one leader --------------------------------------------------------------------------------


class Clocks:
    """A wall clock that can be set, and a steady one."""

    def __init__(self) -> None:
        self.now, self.steady = utc_now(), 1000.0

    def leader(self, holder: str) -> Leadership:
        return Leadership(
            "scheduler:1", 10, holder=holder, now=lambda: self.now, monotonic=lambda: self.steady
        )

    def pass_(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.steady += seconds


def hold(engine: Engine, one: Leadership) -> bool:
    with store.session(engine) as s:
        return one.hold(s).held


def test_of_two_schedulers_one_leads_until_it_stops_renewing(engine: Engine) -> None:
    clocks = Clocks()
    a, b = clocks.leader("a"), clocks.leader("b")
    for _ in range(10):
        assert hold(engine, a) and not hold(engine, b)
        clocks.pass_(3)
    clocks.pass_(8)  # a hangs
    assert hold(engine, b) and not hold(engine, a)
    with store.session(engine) as s:
        b.release(s)
    clocks.now = utc_now()
    assert hold(engine, a)


@ON_SQLITE
def test_a_leader_that_was_away_alone_knows_that_nobody_else_led(engine: Engine) -> None:
    clocks = Clocks()
    a, b = clocks.leader("a"), clocks.leader("b")
    with store.session(engine) as s:
        assert a.hold(s).fresh
    clocks.pass_(60)
    with store.session(engine) as s:
        assert a.hold(s).held and not a.hold(s).fresh
    clocks.pass_(60)
    assert hold(engine, b)
    clocks.pass_(60)
    with store.session(engine) as s:
        assert a.hold(s).fresh


@ON_SQLITE
def test_a_lease_whose_expiry_lies_hours_ahead_is_taken_after_its_length(engine: Engine) -> None:
    clocks = Clocks()
    a, b = clocks.leader("a"), clocks.leader("b")
    assert hold(engine, a)
    clocks.now -= timedelta(hours=5)  # set back, and then a dies
    assert not hold(engine, b)
    clocks.pass_(9)
    assert not hold(engine, b)
    clocks.pass_(2)
    assert hold(engine, b)


@ON_SQLITE
def test_a_leader_whose_clock_is_set_back_goes_on_and_keeps_the_other_out(engine: Engine) -> None:
    clocks = Clocks()
    a, b = clocks.leader("a"), clocks.leader("b")
    assert hold(engine, a) and not hold(engine, b)
    clocks.now -= timedelta(hours=5)
    for _ in range(12):
        clocks.pass_(3)
        assert hold(engine, a) and not hold(engine, b)


class Process:
    """``aurora-sgl scheduler`` as a user starts it."""

    def __init__(self, home: Path, name: str, **rules: object) -> None:
        self.log = home / f"{name}.log"
        environment = {
            f"AURORA_SCHEDULER_{key.upper()}": str(value)
            for key, value in {"lease_seconds": 3, "minutes": 0, "requests": 0, **rules}.items()
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aurora_sgl.cli", "scheduler"],
                stdout=log, stderr=log, env={**os.environ, **environment},
            )  # fmt: skip

    def says(self, words: str, seconds: float = 40.0) -> None:
        try:
            wait_until(lambda: words in self.log.read_text(), seconds, words)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.log.read_text()}") from None

    def health(self) -> dict[str, Any]:
        self.says("health and metrics at")
        line = next(x for x in self.log.read_text().splitlines() if "health and metrics" in x)
        self.url = line.split()[-1]
        answer = httpx.get(f"{self.url}/health", timeout=5)
        return {"code": answer.status_code, **answer.json()}

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        return self.process.wait(30)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    found: list[Process] = []
    yield found
    for each in found:
        each.end()


def test_the_other_scheduler_takes_over_from_one_that_is_killed_and_from_one_that_hangs(
    home: Path, engine: Engine, processes: list[Process]
) -> None:
    RolloutHouse(engine)

    def start(name: str) -> Process:
        processes.append(Process(home, name))
        return processes[-1]

    first = start("first")
    first.says("leads group")
    second = start("second")
    second.says("standing by")
    first.process.kill()
    second.says("this scheduler leads group", 15)
    wait_until(lambda: second.health()["ready"], 10, "the second to be ready")
    assert second.health()["role"] == "leader"
    third = start("third")
    third.says("standing by")
    second.process.send_signal(signal.SIGSTOP)
    third.says("this scheduler leads group", 15)
    second.process.send_signal(signal.SIGCONT)
    second.says("standing by", 15)
    wait_until(lambda: second.health()["role"] == "standby", 10, "the second to stand back")

    def holders() -> set[str]:
        with store.session(engine, write=False) as s:
            row, lease = (
                queries.scheduler_states.scheduler_state(s, 1),
                queries.leases.lease(s, scheduler_lease_name(1)),
            )
        return {one.holder for one in (row, lease) if one is not None}

    wait_until(lambda: len(holders()) == 1, 15, "state and lease to name one holder")
    assert f":{third.process.pid}:" in holders().pop()
    assert third.end() == 0
    wait_until(lambda: status.scheduler(engine, "default").alive, 20, "the second to lead again")


# -- the loop ----------------------------------------------------------------------------------


def test_enough_new_requests_train_a_version_that_passes_and_goes_live_and_is_watched(
    house: House, closing: list[Scheduler]
) -> None:
    closing.append(one := scheduler(house.engine))
    rounds(one, lambda: one.details)
    assert one.child is None
    house.serve(60)
    rounds(one, lambda: one.child)
    said = status.scheduler(house.engine, "default")
    assert said.alive and said.details["new_requests"] == 60
    one.tick()
    assert status.scheduler(house.engine, "default").state == "training"

    def live() -> int | None:
        with store.session(house.engine, write=False) as s:
            number = queries.aliases.aliases(s, 1)["live"]
        return number if number != house.live else None

    number = rounds(one, live)
    with store.session(house.engine, write=False) as s:
        row = queries.deployments.deployments(s, 1, limit=1)[0]
        run = queries.runs.runs(s, 1)[0]
        watched = queries.watches.running_watch(s, 1)
    assert (row.actor, row.version_id, row.previous_version_id) == ("scheduler", number, house.live)
    assert row.evaluation_id is not None and row.evidence["replay"]["verdict"] == "pass"
    assert (run.trigger, run.status) == ("requests", "succeeded")
    assert watched is not None and watched.version_id == number
    rounds(one, lambda: one.child is None)
    for _ in range(2):
        one.look_now()
        one.tick()
    assert one.child is None, "what was learnt from is not new any more"
    said = status.scheduler(house.engine, "default")
    assert said.state == "watch" and "new requests" in said.next_action


@ON_SQLITE
def test_why_a_candidate_was_not_judged_is_said_in_the_log_by_status_and_on_the_page(
    house: House, closing: list[Scheduler], caplog: pytest.LogCaptureFixture
) -> None:
    """cases.md: a group whose candidates are never judged."""
    closing.append(one := scheduler(house.engine))
    one.recipe["min_gate_requests"] = 1000
    house.serve(60)
    with caplog.at_level("INFO", logger="aurora_sgl"):
        outcome = rounds(one, lambda: one.last_outcome)
    number, why = outcome["version_id"], outcome["reason"]
    assert "held-out requests can be judged, at least 1000 needed" in why
    assert f"training succeeded: version {number}, inconclusive: {why}" in caplog.messages
    told = subprocess.run(
        [sys.executable, "-m", "aurora_sgl.cli", "status"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"not live: version {number}: not judged: {why}" in " ".join(told.stdout.split())
    assert f"Version {number}: not judged: {why}" in said(draw(house.home, "Now"))


@ON_SQLITE
def test_a_run_ends_within_five_seconds_of_the_switch_and_starts_when_it_is_on_again(
    house: House, closing: list[Scheduler]
) -> None:
    rules = RULES.model_copy(update={"cooldown_minutes": 0.0})
    closing.append(one := scheduler(house.engine, rules))
    one.recipe["passes"] = 100_000
    house.serve(60)
    child = rounds(one, lambda: one.child)
    rounds(one, lambda: child.progress.get("event") == "update")
    switches.turn(house.engine, "default", "learning", False, actor="ada", reason="too warm")
    begun = time.monotonic()
    rounds(one, lambda: one.child is None, 5.0)
    assert time.monotonic() - begun < 5 and not psutil.pid_exists(child.pid)
    one.look_now()
    one.tick()
    said = status.scheduler(house.engine, "default")
    assert (said.state, said.reason) == ("off", "learning is switched off")
    with store.session(house.engine, write=False) as s:
        assert queries.runs.runs(s, 1)[0].error == switches.LEARNING_WENT_OFF
    switches.turn(house.engine, "default", "learning", True, actor="ada", reason="cooler")
    rounds(one, lambda: one.child)


@ON_SQLITE
def test_a_run_is_paused_while_requests_wait_and_keeps_its_lease(
    house: House, closing: list[Scheduler]
) -> None:
    closing.append(one := scheduler(house.engine))
    one.recipe["passes"] = 100_000
    house.serve(60)
    child = rounds(one, lambda: one.child)
    rounds(one, lambda: child.progress.get("event") == "update")

    def queue(length: float) -> None:
        with store.session(house.engine) as s:
            row = queries.servers.servers(s, 1)[0]
            queries.servers.touch_server(
                s, row.id, counters={"queue": length}, last_seen_at=utc_now()
            )  # fmt: skip

    queue(9)
    rounds(one, lambda: child.paused)
    rounds(one, lambda: status.scheduler(house.engine, "default").details["training"]["paused"])
    assert "9 requests wait" in status.scheduler(house.engine, "default").reason
    before = child.progress
    time.sleep(1.0)
    assert child.progress == before
    with store.session(house.engine) as s:  # the store is not blocked by a stopped process
        row = queries.leases.lease(s, training_lease_name(1))
        assert row is not None and f":{child.pid}:" in row.holder
        assert row.expires_at > utc_now() + timedelta(seconds=250)
    queue(0)
    rounds(one, lambda: child.progress != before)
    other = scratch.make(house.target, draft_vocab_size=40, seed=2, model=str(house.target))
    folder = checkpoint.save(other, house.home / "other")
    by_hand = import_version(house.engine, house.artifacts, folder, "default").id
    promote(house.engine, by_hand, actor="ada", reason="mine", force=True)
    rounds(one, lambda: child.outcome(), 10)

    def error() -> str:  # the round after the end says why
        with store.session(house.engine, write=False) as s:
            return str(queries.runs.runs(s, 1)[-1].error)

    rounds(one, lambda: f"version {by_hand} went live meanwhile" in error(), 10)


def passed(
    house: RolloutHouse, letter: str, verdict: str = "pass", trigger: str = "requests"
) -> int:
    """A version that a run made from what is live, with its evaluation against that."""
    with store.session(house.engine) as s:
        live = queries.aliases.aliases(s, house.group_id)["live"]
        run = queries.runs.start_run(s, house.group_id, trigger=trigger, base_version_id=live)
        queries.runs.finish_run(s, run.id, "succeeded")
        made = samples.add_version(
            s, house.group_id, letter, parent_id=live, training_run_id=run.id
        )
        queries.evaluations.add_evaluation(
            s, candidate_id=made, baseline_id=live, kind="replay", requests=40, verdict=verdict,
            candidate_accept_length=2.0, baseline_accept_length=1.8, difference=0.2,
        )  # fmt: skip
        return made


def look(one: Scheduler, times: int = 1) -> status.SchedulerStatus:
    for _ in range(times):
        one.look_now()
        one.tick()
    return status.scheduler(one.link.engine(), "default")


def aliases(engine: Engine) -> dict[str, int]:
    with store.session(engine, write=False) as s:
        return queries.aliases.aliases(s, 1)


@ON_SQLITE
def test_what_passed_waits_while_auto_promote_is_off_and_goes_live_when_it_is_on(
    home: Path, engine: Engine, closing: list[Scheduler]
) -> None:
    house = RolloutHouse(engine)
    made = passed(house, "d")
    switches.turn(engine, "default", "auto_promote", False, actor="ada", reason="a freeze")
    closing.append(one := scheduler(engine))
    said = look(one, 3)
    assert aliases(engine) == {"live": house.a, "candidate": made}
    assert "passed the gate: auto_promote is switched off" in said.reason
    switches.turn(engine, "default", "auto_promote", True, actor="ada", reason="over")
    look(one)
    assert aliases(engine) == {"live": made, "previous": house.a}


@ON_SQLITE
def test_a_candidate_that_goes_live_as_a_trigger_is_due_is_what_the_next_run_starts_from(
    home: Path, engine: Engine, closing: list[Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same round of the scheduler: not from the base that has just been left."""
    house = RolloutHouse(engine)
    made = passed(house, "d")
    house.serve(house.a, 0.5, since=utc_now(), requests=4, apart=0.01)
    with store.session(engine) as s:
        for request_id in s.scalars(select(Request.id)).all():
            add_trace(s, request_id)
    starts: list[tuple[str, int | None]] = []
    monkeypatch.setattr(Scheduler, "_start", lambda self, *run: starts.append(run))
    rules = RULES.model_copy(update={"requests": 1, "min_new_requests": 1})
    closing.append(one := scheduler(engine, rules))
    look(one)
    assert aliases(engine)["live"] == made
    assert starts == []
    look(one)
    assert starts == [("requests", made)]


@ON_SQLITE
def test_only_what_passed_against_what_is_live_now_goes_live_by_itself(
    home: Path, engine: Engine, closing: list[Scheduler]
) -> None:
    house = RolloutHouse(engine)
    passed(house, "d", "inconclusive")
    passed(house, "e", "fail")
    passed(house, "f", trigger="manual")  # somebody's own: left to them
    closing.append(one := scheduler(engine))
    look(one, 3)
    assert aliases(engine) == {"live": house.a}
    stale = passed(house, "9")
    promote(engine, house.b, actor="ada", reason="mine", force=True)
    look(one, 3)
    assert aliases(engine)["live"] == house.b != stale


@ON_SQLITE
def test_a_worse_version_is_rolled_back_rests_and_is_not_promoted_again(
    home: Path, engine: Engine, closing: list[Scheduler]
) -> None:
    house = RolloutHouse(engine)
    house.serve(house.a, 0.5, since=utc_now() - timedelta(hours=1), requests=40)
    made = passed(house, "d")
    rules = RULES.model_copy(update={"cooldown_minutes": 5.0, "requests": 1})
    closing.append(one := scheduler(engine, rules, watching=WatchSettings(steps=200, requests=4)))
    look(one)
    assert aliases(engine)["live"] == made
    house.follow(made)
    with store.session(engine, write=False) as s:
        watched = queries.watches.running_watch(s, 1)
    assert watched is not None
    house.serve(made, 0.1, since=watched.started_at, requests=5, apart=0.01)
    said = look(one, 2)
    assert aliases(engine) == {"live": house.a}
    assert (said.state, said.reason) == ("cooldown", "rest after a rollback")
    assert said.next_at is not None and said.next_at > utc_now() + timedelta(minutes=4)
    other = passed(house, "e")
    said = look(one, 2)
    assert aliases(engine) == {"live": house.a, "candidate": other}
    assert "rest after a rollback" in said.reason


@ON_SQLITE
def test_a_fall_of_the_live_accept_length_is_stored_with_its_evidence_and_is_a_trigger(
    home: Path, engine: Engine, closing: list[Scheduler]
) -> None:
    house = RolloutHouse(engine)
    rules = RULES.model_copy(update={"requests": 0, "min_new_requests": 1000})
    closing.append(one := scheduler(engine, rules))
    since = house.serve(
        house.a, 0.6, since=utc_now(), requests=60, steps=30, domain="code", apart=0.01
    )
    look(one)
    assert status.drifts(engine, "default") == []
    house.serve(
        house.a, 0.25, since=since, requests=60, steps=30, domain="code", seed=1, apart=0.01
    )
    look(one, 2)
    (fall,) = status.drifts(engine, "default")
    assert (fall.domain, fall.version_id) == ("code", house.a)
    assert fall.accept_length_after < fall.accept_length_before - 0.4
    assert fall.details["detector"] == "river.drift.PageHinkley"
    assert "code: 2." in one.details["drift"]
    one.close()
    closing.append(second := scheduler(engine, rules))
    look(second, 2)
    assert len(status.drifts(engine, "default")) == 1, "the next scheduler does not tell it again"


@ON_SQLITE
def test_with_trials_what_passed_the_gate_is_tried_before_it_goes_live(
    home: Path, engine: Engine, closing: list[Scheduler]
) -> None:
    house = RolloutHouse(engine)
    made = passed(house, "d")
    rules = TrialSettings(automatic=True, pairs=3, window_seconds=5, warm_seconds=0)
    clock = {"now": utc_now()}
    closing.append(one := scheduler(engine, trials=rules, elapsed=Elapsed(lambda: clock["now"])))
    said = look(one)
    assert aliases(engine)["live"] == house.a and "its trial has begun" in said.reason
    for window in range(8):
        look(one)
        with store.session(engine, write=False) as s:
            wanted = queries.aliases.wanted_version(s, 1, clock["now"])
        assert wanted is not None
        house.serve(
            wanted.version_id, 0.6 if wanted.version_id == made else 0.3, since=clock["now"],
            requests=3, steps=30, step_ms=20, seed=window,
        )  # fmt: skip
        clock["now"] += timedelta(seconds=6)
    look(one, 2)
    assert aliases(engine)["live"] == made
    with store.session(engine, write=False) as s:
        assert queries.deployments.deployments(s, 1, limit=1)[0].evidence["trial_id"] == 1


def test_a_store_that_is_away_is_waited_for_and_the_round_goes_on(
    tmp_path: Path, upgraded_sqlite: Path
) -> None:
    path = tmp_path / "own.db"
    shutil.copy(upgraded_sqlite, path)
    engine = store.connect(f"sqlite:///{path}")
    house = RolloutHouse(engine)
    one = scheduler(engine)
    look(one)
    made = passed(house, "d")
    engine.dispose()
    one.link.engine().dispose()  # nothing is left in the file beside it
    path.rename(tmp_path / "away.db")
    for _ in range(3):
        with pytest.raises(StoreAway, match="gone"):
            one.tick()
    (tmp_path / "away.db").rename(path)
    assert look(one).alive
    assert aliases(store.connect(f"sqlite:///{path}"))["live"] == made
    one.close()


@ON_SQLITE
def test_a_clock_that_is_set_back_keeps_neither_rest_nor_period_for_hours(
    home: Path, engine: Engine, closing: list[Scheduler]
) -> None:
    house = RolloutHouse(engine)
    passed(house, "d", "fail")  # a run that has just ended
    clocks = Clocks()
    clocks.now -= timedelta(hours=6)
    rules = RULES.model_copy(update={"minutes": 30.0, "cooldown_minutes": 1.0, "requests": 0})
    elapsed = Elapsed(lambda: clocks.now, lambda: clocks.steady)
    closing.append(one := scheduler(engine, rules, elapsed=elapsed))
    assert look(one).state == "cooldown"
    clocks.pass_(61)
    said = look(one)
    assert said.state == "waiting" and "0 new requests" in said.reason


@ON_SQLITE
def test_a_run_of_a_dead_process_of_this_machine_keeps_nobody_waiting(
    home: Path, engine: Engine, closing: list[Scheduler]
) -> None:
    RolloutHouse(engine)
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    with store.session(engine) as s:
        queries.leases.acquire_lease(
            s, training_lease_name(1), f"{socket.gethostname()}:{os.getpid()}:x", 300
        )
    closing.append(one := scheduler(engine))
    said = look(one)
    assert said.state == "training" and "goes on" in said.reason
    with store.session(engine) as s:
        held = queries.leases.lease(s, training_lease_name(1))
        assert held is not None
        queries.leases.release_lease(s, held.name, held.holder, held.token)
        queries.leases.acquire_lease(
            s, training_lease_name(1), f"{socket.gethostname()}:{gone.pid}:x", 300
        )
    assert look(one).state == "waiting"


@ON_SQLITE
def test_health_is_ready_only_when_rounds_are_done_and_metrics_say_what_is_served(
    home: Path, engine: Engine, processes: list[Process]
) -> None:
    house = RolloutHouse(engine)
    house.serve(house.a, 0.5, since=utc_now() - timedelta(minutes=1), requests=5, apart=0.1)
    passed(house, "d", "fail")
    processes.append(one := Process(home, "only"))
    one.says("leads group")
    wait_until(lambda: one.health()["code"] == 200, 20, "ready")
    assert one.health()["state"] in ("waiting", "cooldown")

    def metrics() -> str:
        return httpx.get(f"{one.url}/metrics", timeout=5).text

    text = wait_until(lambda: found if "verdicts" in (found := metrics()) else "", 20, "metrics")
    assert f'aurora_accept_length{{domain="chat",version="{house.a}"}}' in text
    assert 'aurora_verdicts_total{kind="replay",verdict="fail"} 1.0' in text
    assert "aurora_scheduler_leads 1.0" in text
    switches.turn(engine, "default", "learning", False, actor="ada", reason="x")
    wait_until(lambda: one.health()["state"] == "off", 5, "the switch")
    assert one.end() == 0
    with store.session(engine) as s:
        lease = queries.leases.lease(s, scheduler_lease_name(1))
        assert lease is not None and lease.expires_at <= utc_now(), "the next need not wait"
    assert not status.scheduler(engine, "default").alive
