"""What a run says of itself while it goes on: stage, time left, curves; and who believes it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.rollout.run_progress import RunProgress, going_on
from aurora_sgl.store import queries
from aurora_sgl.store.liveness import training_lease_name
from aurora_sgl.store.models import TrainingRun
from aurora_sgl.training.reporter import MOST_POINTS, Curve, RunReporter


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = store.connect(f"sqlite:///{tmp_path / 'aurora.db'}")
    store.upgrade(made)
    with store.session(made) as s:
        group = queries.groups.ensure_group(s, "default", "model", "", "LlamaForCausalLMEagle3")
        queries.runs.start_run(s, group.id, trigger="requests")
    yield made
    made.dispose()


class Run:
    """A run whose clock we turn; by itself it writes nothing."""

    def __init__(self, engine: Engine, **past: list[float]) -> None:
        self.now = 0.0
        self.reporter = RunReporter(engine, 1, past, clock=lambda: self.now)

    def says(self, name: str, after: float = 0.0, **more: Any) -> dict[str, Any]:
        self.now += after
        self.reporter({"event": name, **more})
        return self.reporter.state()


def updates(run: Run, first: int, last: int, of: int, seconds: float) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for number in range(first, last + 1):
        state = run.says("update", seconds, update=number, updates=of, loss=1.0 / number)
    return state


def test_time_left_is_told_once_the_pace_is_known_and_not_before(engine: Engine) -> None:
    run = Run(engine)
    state = run.says("window", 3.0, requests=40, dev=4, gate=12)
    assert state["stage"] == "training" and state["requests"] == 40
    assert state["seconds_left"] is None and state["stage_seconds_left"] is None
    # The first update has what starting took in it: 30 s, the others 2 s each.
    state = updates(run, 1, 1, 20, 30.0)
    assert state["stage_seconds_left"] is None
    state = updates(run, 2, 10, 20, 2.0)
    assert (state["done"], state["total"]) == (10, 20)
    assert state["stage_seconds_left"] == pytest.approx(20.0)
    assert state["seconds_left"] is None, "what replays take can't be told before one was made"
    # A replay of 4 requests takes 1 s: 5 of them to choose, 2 drafters over 12 for the gate.
    state = run.says("pass", 1.0, update=10, updates=20, dev_accept_length=[1.5])
    assert state["seconds_left"] == pytest.approx(state["stage_seconds_left"] + 5 + 6)
    assert state["curves"]["accept_length"] == [[10.0, 1.5]]


def test_the_last_run_tells_what_comes_after_the_stage_that_goes_on(engine: Engine) -> None:
    run = Run(engine, reading=[4.0, 0], training=[50.0, 20], choosing=[10.0, 5], gate=[12.0, 24],
              storing=[2.0, 0])  # fmt: skip
    run.now = 1.0
    assert run.reporter.state()["seconds_left"] == pytest.approx(3 + 50 + 10 + 2), "gate: of none"
    state = run.says("window", requests=40, gate=12)
    assert state["seconds_left"] == pytest.approx(50 + 10 + 6 + 2)
    state = run.says("gate", 1.0, requests=12, done=0)
    assert state["seconds_left"] == pytest.approx(6 + 2)
    state = run.says("gate", 4.0, requests=12, done=4)  # slower than the last one
    assert state["stage_seconds_left"] == pytest.approx(8.0)
    run.says("storing")
    assert run.reporter.stages()["gate"] == [4.0, 12]


def test_a_run_with_a_limit_has_no_more_left_than_that(engine: Engine) -> None:
    run = Run(engine)
    run.says("window", requests=40, gate=12)
    for number in range(1, 6):
        state = run.says("update", 1.0, update=number, updates=1000, loss=1.0, seconds_allowed=9.0)
    assert state["stage_seconds_left"] == pytest.approx(9.0)


def test_what_was_done_before_a_kill_is_in_the_curve_and_not_in_the_pace(engine: Engine) -> None:
    run = Run(engine)
    state = run.says(
        "resumed", 1.0, update=50, updates=100, loss=[3.0, 2.0], dev_accept_length=[1.4]
    )
    assert state["curves"]["loss"] == [[25.0, 3.0], [50.0, 2.0]]
    state = updates(run, 51, 60, 100, 2.0)
    assert state["stage_seconds_left"] == pytest.approx(80.0)
    state = run.says("pass", update=60, updates=100, dev_accept_length=[1.4, 1.6])
    assert [y for _, y in state["curves"]["accept_length"]] == [1.4, 1.6]


def test_a_curve_keeps_its_form_in_few_points() -> None:
    curve = Curve()
    for x in range(10_000):
        curve.add(x, 3.0 - x / 5000)
    curve.add(10_000, float("nan"))
    points = curve.points()
    assert MOST_POINTS / 2 <= len(points) <= MOST_POINTS + 1
    assert all(abs(y - (3.0 - x / 5000)) < 1e-3 for x, y in points)
    assert points[0][0] < 100 and points[-1][0] > 9900
    assert len(json.dumps(points)) < 5000


def test_it_writes_every_so_often_and_not_more(engine: Engine) -> None:
    writes: list[float] = []

    @event.listens_for(engine, "before_cursor_execute")
    def count(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("UPDATE training_run"):
            writes.append(time.monotonic())

    reporter = RunReporter(engine, 1, every=0.3)
    reporter.start()
    until = time.monotonic() + 1.2
    number = 0
    while time.monotonic() < until:
        number += 1
        reporter({"event": "update", "update": number, "updates": 10**6, "loss": 1.0})
        time.sleep(0.01)
    reporter.close()
    assert 2 <= len(writes) <= 5
    assert all(b - a >= 0.29 for a, b in pairwise(writes))
    assert going_on(engine, 1) is not None
    count_then = len(writes)
    reporter({"event": "storing"})
    time.sleep(0.4)
    assert len(writes) == count_then


def test_a_run_is_lost_once_nobody_writes_and_nobody_holds_its_lease(engine: Engine) -> None:
    def progress(age: float) -> RunProgress:
        at = utc_now() - timedelta(seconds=age)
        with store.session(engine) as s:
            word = {"stage": "training", "done": 3, "total": 9, "seconds_left": 60.0,
                    "stage_seconds_left": 40.0, "updated_at": at.isoformat()}  # fmt: skip
            queries.runs.note_progress(s, 1, word)
        now = going_on(engine, 1)
        assert now is not None
        return now

    fresh = progress(5)
    assert not fresh.silent and not fresh.lost and fresh.share == pytest.approx(1 / 3)
    assert fresh.left(utc_now()) == pytest.approx(55, abs=1)
    assert fresh.doing == "training, 3 of 9 updates"
    sentence = fresh.sentence(fresh.updated_at or utc_now())
    assert sentence == "run 1 (requests), training, 3 of 9 updates; about 60 s left"
    assert progress(40).lost and progress(40).left(utc_now()) is None
    with store.session(engine) as s:
        name = training_lease_name(1)
        token = queries.leases.acquire_lease(s, name, "gpu-9:7:x", 300) or 0
    assert progress(40).silent and not progress(40).lost
    with store.session(engine) as s:
        details = {"training": {"paused": True}, "load": {"reason": "5 requests wait"}}
        queries.scheduler_states.set_scheduler_state(
            s, 1, holder="x", state="training", reason="", next_action="", next_at=None,
            details=details,
        )  # fmt: skip
    assert progress(40).paused == "5 requests wait"
    with store.session(engine) as s:
        queries.leases.release_lease(s, name, "gpu-9:7:x", token)
    assert progress(40).lost


def test_what_failed_keeps_how_far_it_came_and_what_ended_takes_no_more(engine: Engine) -> None:
    with store.session(engine) as s:
        queries.runs.note_progress(s, 1, {"stage": "gate"})
        queries.runs.fail_running(s, 1, "the trainer stopped without a word")
        queries.runs.note_progress(s, 1, {"stage": "storing"})
        other = queries.runs.start_run(s, 1, trigger="requests")
        queries.runs.finish_run(s, other.id, "skipped", progress={"stage": "reading"})
    with store.session(engine, write=False) as s:
        assert s.get_one(TrainingRun, 1).progress == {"stage": "gate"}
        assert s.get_one(TrainingRun, other.id).progress == {}
    assert going_on(engine, 1) is None
