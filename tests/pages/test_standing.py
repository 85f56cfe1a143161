"""The headline claims nothing that is not so, in every state of a group, and each state and alert
leads to a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aurora_sgl import rollout, store
from aurora_sgl.clock import utc_now
from aurora_sgl.rollout.alerts import KINDS, Alert
from aurora_sgl.rollout.stages import StageStatus
from aurora_sgl.rollout.status import GroupStatus, SchedulerStatus, ServerStatus
from aurora_sgl.rollout.switches import SwitchState
from aurora_sgl.store import queries
from aurora_sgl.store.models import FreezeWindow, RolloutStage
from dashboard import next_steps, standing
from dashboard.next_steps import NextStep
from dashboard.standing import Speed, Standing
from tests.pages.test_pages import draw, said
from tests.support import dashboard_house as samples
from tests.support.browser import PAGES
from tests.support.dashboard_house import House

Use = Callable[..., None]
FASTER = Speed(1.9, 1.4, 1.3, 1.0)


def server(name: str = "gpu-1:30000", phase: str = "speculating", **more: Any) -> ServerStatus:
    status = ServerStatus(1, name, 3, "", 3, True, "", phase, "the <b>reason</b>", 1.0, utc_now(),
                          False)  # fmt: skip
    return replace(status, **more)


def group(*servers: ServerStatus, learning: bool = True, **more: Any) -> GroupStatus:
    scheduler = SchedulerStatus(True, "", "waiting", "", "", None, {}, utc_now())
    switch = SwitchState("learning", learning, "", "", None)
    fields: dict[str, Any] = {
        "group": "default", "generation": 1, "aliases": {"live": 3}, "wanted_version_id": 3,
        "trial_id": None, "servers": list(servers), "switches": [switch], "scheduler": scheduler,
        "watch": None, "trial": None, "stage": None, "freeze": None, "training": None,
        "last_verdict": None, "not_live": None, "retention": None,
    }  # fmt: skip
    return GroupStatus(**{**fields, **more})


SILENT = server(silent=True, converged=False)
DEAD = {"codes": {"gpu-1:30000": frozenset({"agent"})}}
OFF = server(phase="off", phase_reason="speculation is set to off")
IDLE = replace(FASTER, is_now=False)
PLAIN, SLOW = Speed(None, None, 1.3), replace(FASTER, speed_up=0.8, draft_share=0.1)
#: State, what its headline says, and what it must not claim: servers, speed, and more.
STATES: list[tuple[str, list[ServerStatus], Speed | None, dict[str, Any], str, str]] = [
    ("never", [], None, {}, "no server is running", "faster"),
    ("no server", [], FASTER, {}, "When requests were served last, a step yielded 1.90", "faster"),
    ("silent", [SILENT], FASTER, {}, "Whether requests are served, and how fast", "faster"),
    ("silent", [SILENT], None, {}, "without a sidecar that reaches the store", "served last"),
    ("not started", [server()], FASTER, DEAD, "nothing is recorded, traced", "faster"),
    ("starting", [server(phase="")], None, {}, "A server is starting", "faster"),
    ("starting", [server(phase="")], IDLE, {}, "served last, a step yielded 1.90", "faster"),
    ("nothing served", [server()], None, {}, "No request was served yet", "faster"),
    ("nothing served", [OFF], None, {}, "will be served without drafts", "faster"),
    ("off", [OFF], PLAIN, {}, "switched off", "faster"),
    ("off", [OFF], FASTER, {}, "served without drafts. When", "faster"),
    ("no traffic", [server()], IDLE, {}, "No traffic now", "faster"),
    ("no drafts", [server()], PLAIN, {}, "No step carried drafts lately", "times the speed"),
    ("not measured", [server()], replace(FASTER, speed_up=None), {}, "is known once", "faster"),
    ("slower", [server(phase="exploring")], SLOW, {}, "not faster yet: 0.80 times", "is faster"),
    ("exploring", [server(phase="exploring")], replace(FASTER, draft_share=0.1), {},
     "is being tried", "faster"),
    ("faster", [server()], FASTER, {}, "is faster: 1.40 times", "not faster"),
    ("faster", [server(), server("gpu-2", silent=True)], FASTER, {}, "1 of 2 servers is not heard",
     "2 of 2"),
    ("faster", [server(), server("gpu-2", "exploring")], FASTER, {}, "1 of 2 servers is still",
     "2 of 2"),
    ("faster", [server(), server("gpu-2", converged=False)], FASTER, {},
     "Version 3 should run and does on 1 of 2 servers", "is live"),
    ("faster", [server()], replace(FASTER, loses_at=(2, 16)), {},
     "lose with 2, 9 to 16 requests at once", "left out"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "servers", "speed", "more", "says", "not_so"), STATES)
def test_the_headline_is_what_is_so(
    code: str, servers: list[ServerStatus], speed: Speed | None, more: Any, says: str, not_so: str
) -> None:
    line = standing.headline(Standing(group(*servers), speed, **more))
    assert line.code == code and says in line.text, line
    assert not_so not in line.text.replace("not faster yet", "")
    assert "reason" not in line.text  # what others wrote stands apart
    assert line.tone == standing.GOOD or (line.step is not None and line.step.page in PAGES)
    assert (line.tone == standing.GOOD) is (code == "faster")


def test_every_state_has_a_case() -> None:
    names = {function.__name__ for function in standing.HEADLINES}
    assert len({state[0] for state in STATES}) == len(names) + 1  # two of them where nothing runs


REFUSED = {"traces_admitted": 3.0, "traces_refused_rate": 9.0, "traces_refused_memory": 2.0}


@pytest.mark.parametrize(
    ("more", "codes", "says"),
    [
        ({}, [], ""),
        ({"newest": 200}, ["consent"], "None of the newest 200 requests may be learnt from"),
        ({"newest": 200, "may_train": 1}, [], ""),
        ({"newest": 3}, [], ""),  # too few to tell
        ({"counters": {"gpu-1:30000": {"capture_share": 0.0}}}, ["capture off"], "CAPTURE_SHARE"),
        ({"counters": {"gpu-1:30000": REFUSED}}, ["budgets"], "11 of 14 requests"),
        ({"counters": {"gpu-1:30000": {**REFUSED, "traces_admitted": 12.0}}}, [], ""),
        ({"counters": {"gpu-1:30000": {"traces_refused_latency": 2.0}}}, ["budgets"], "slow"),
    ],
)
def test_what_holds_beside_it_is_said_with_its_setting(
    more: dict[str, Any], codes: list[str], says: str
) -> None:
    lines = standing.beside(Standing(group(server()), FASTER, **more))
    assert [line.code for line in lines] == codes
    assert all(says in line.text and line.step is not None for line in lines)


def test_a_stage_and_a_freeze_are_said_with_where_they_are_ended() -> None:
    stage = RolloutStage(version_id=4, servers=["gpu-1<b>"], status="running", windows=[{}])
    freeze = FreezeWindow(ends_at=utc_now(), actor="ada", reason="release <b>week</b>")
    look = group(server(), server("gpu-2"), stage=StageStatus(stage, 3), freeze=freeze)
    staged, frozen = standing.beside(Standing(look, FASTER))
    assert "Version 4 runs on 1 of 2 servers before the rest; 1 of 3 windows" in staged.text
    assert staged.step is not None and dict(staged.step.query) == {"version": "4"}
    assert "Nothing goes live by itself until" in frozen.text and "week" not in frozen.text
    stage.status = "failed"
    assert standing.beside(Standing(replace(look, freeze=None), FASTER)) == []


def test_learning_that_is_switched_off_is_an_alert_and_no_fault_of_a_setting() -> None:
    off = {"gpu-1:30000": {"capture_share": 0.0}}
    look = group(server(), learning=False)
    assert standing.beside(Standing(look, FASTER, counters=off)) == []
    stranger = group(server(live_version_id=None))
    assert [line.code for line in standing.beside(Standing(stranger, FASTER))] == ["no version"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_alert_leads_to_a_page(kind: str) -> None:
    watch = SimpleNamespace(watch=SimpleNamespace(version_id=4))
    for look in (group(server()), group(aliases={}, wanted_version_id=None), group(watch=watch)):
        step = next_steps.of_alert(Alert(kind, "7", "warning", "x"), look)
        assert step is not None and step.page in PAGES and step.label
        assert step.hint
    assert set(next_steps.BY_KIND) == set(KINDS)


def test_a_link_names_what_it_is_about() -> None:
    watch = SimpleNamespace(watch=SimpleNamespace(version_id=4))
    look = group(server(), watch=watch)
    expected = {
        "training_failed": ("Training", {"run": "7"}),
        "watch_failed": ("Versions", {"version": "4"}),
        "server_behind": ("Versions", {"version": "3"}),
        "too_many_domains": ("Acceptance", {"lines": "by domain"}),
        "switch_off": ("Training", {}),
    }
    for kind, (page, query) in expected.items():
        step = cast(NextStep, next_steps.of_alert(Alert(kind, "7", "warning", "x"), look))
        assert (step.page, dict(step.query)) == (page, query)


@pytest.fixture
def small(tmp_path: Path, settings_of: Use) -> Iterator[House]:
    house = samples.empty(tmp_path)
    samples.add_servers(house)
    samples.add_version(house)
    rollout.promote(house.engine, 1, actor="test", reason="go", force=True)
    house.servers_follow()
    settings_of(tmp_path)
    yield house
    house.engine.dispose()


def links(app: Any) -> dict[str, str]:
    """Pages by the labels of links to them, with the query of their addresses."""
    return {
        one.proto.label: f"{one.proto.page}?{one.proto.query_string}"
        for one in app.get("page_link")
    }


def test_now_links_to_the_page_that_does_what_is_next(small: House) -> None:
    with store.session(small.engine) as s:
        for number in range(3):
            run = queries.runs.start_run(s, small.group_id, trigger="requests")
            error = f"no trace of run {number + 1}"
            queries.runs.finish_run(s, run.id, "failed", error=error)
        for server_id in small.servers.values():
            queries.servers.touch_server(s, server_id, phase_reason="<b>odd</b>", phase="off")
    app = draw(small.home, "Now")
    assert "No request was served yet" in app.info[0].value
    assert links(app)["Run 3"] == "training?run=3"
    with store.session(small.engine) as s:
        for server_id in small.servers.values():
            long_ago = utc_now() - timedelta(hours=1)
            queries.servers.touch_server(s, server_id, last_seen_at=long_ago)
    app.run()
    assert "No server is heard of" in app.error[0].value
    # The headline's, and one for the alerts of both servers.
    assert [one.proto.page for one in app.get("page_link")].count("versions") == 2
    app = draw(small.home, "Training")
    for asked, shown in (("2", "Run 2"), ("9" * 30, "Run 3"), ("<b>", "Run 3")):
        app.query_params["run"] = asked
        app.run()
        assert f"{shown}: ✖ failed" in said(app)
