"""Now says what an operator should look at, what comes next, and nothing when all is well."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from aurora_sgl import rollout, store
from aurora_sgl.clock import utc_now
from aurora_sgl.rollout.switches import turn
from aurora_sgl.store import queries
from aurora_sgl.store.domains import OTHER, DomainNames, day_of
from tests.pages.test_pages import draw, said
from tests.support import dashboard_house as samples
from tests.support.dashboard_house import House

Use = Callable[..., None]
#: Markdown that would make a browser ask another machine, and how it may not stand on a page.
PICTURE = "![x](http://192.0.2.1/x.png)"
ESCAPED = "!\\[x\\](http:\u2060//192.0.2.1/x.png)"


@pytest.fixture
def small(tmp_path: Path, settings_of: Use) -> Iterator[House]:
    """Two versions, the second one live, two servers that run it, and a few requests."""
    house = samples.empty(tmp_path)
    samples.add_servers(house)
    for parent in (None, 1):
        samples.add_version(house, parent)
    for version in house.versions:
        rollout.promote(house.engine, version, actor="test", reason="go", force=True)
        house.servers_follow()
    rng = random.Random(1)
    for minutes in range(10, 0, -1):
        house.serve(utc_now() - timedelta(minutes=minutes), 2, steps=25, rng=rng)
    settings_of(tmp_path)
    yield house
    house.engine.dispose()


def touch(house: House, boot: int, **columns: Any) -> None:
    with store.session(house.engine) as s:
        queries.servers.touch_server(s, house.servers[boot], **columns)


def test_nothing_is_wrong_when_servers_run_what_they_should(small: House) -> None:
    app = draw(small.home, "Now")
    assert not app.error and not app.warning
    assert "None: servers run what they should, nothing was lost, nothing drifted." in said(app)


def test_more_domains_than_are_told_apart_are_said_on_both_pages(small: House) -> None:
    with small.engine.begin() as connection:
        names = DomainNames(connection, small.group_id, 3)
        names.settle([(day_of(utc_now()), f"user-{n}") for n in range(5)])
    rng = random.Random(1)
    small.serve(utc_now() - timedelta(minutes=1), 2, domain=OTHER, steps=25, rng=rng)
    assert "Clients named more than 3 domains today (UTC)" in said(draw(small.home, "Now"))
    shown = said(draw(small.home, "Acceptance"))
    assert '"other" are the requests of domains beyond those that are told apart' in shown


def test_what_the_budgets_of_traces_hold_is_told_and_a_trigger_that_they_cannot_fill(
    small: House,
) -> None:
    counters = {
        "trace_row_bytes": 65536.0, "trace_budget_disk": 2.0 * 1024**3,
        "trace_budget_unfinished": 512.0 * 1024**2, "trace_budget_second": 64.0 * 1024**2,
    }  # fmt: skip
    touch(small, 77, counters=counters)
    assert "the files hold 32,768 tokens" in said(draw(small.home, "Now"))
    with store.session(small.engine) as s:
        request_id = s.execute(text("SELECT min(id) FROM request")).scalar_one()
        queries.traces.add_trace(
            s, request_id=request_id, uri="traces/x", bytes=32 * 1024**2, sha256="", start=0,
            end=512, output_start=10, prompt_sha256="", head_sha256="", greedy=True,
            aux_width=1, last_width=1, dtype="bfloat16", created_at=utc_now(),
        )  # fmt: skip
    app = draw(small.home, "Now")
    assert "about 64 requests" in said(app)
    assert any("Training begins after 200 new requests" in one.value for one in app.warning)


def test_a_server_that_runs_something_else_or_is_silent_is_told_with_the_reason(
    small: House,
) -> None:
    touch(small, 77, live_version_id=1, last_error="version 2: sha256 differs from the manifest")
    touch(small, 78, last_seen_at=utc_now() - timedelta(minutes=7))
    app = draw(small.home, "Now")
    (told,) = [element.value for element in app.error]
    assert "gpu-1:30000 should run version 2 and runs version 1" in told
    assert "sha256 differs from the manifest" in told
    assert "gpu-2:30000 was last heard of 7 min ago" in told and "sidecar" in told
    assert "✖ not heard of since" in said(app)
    assert "UTC" in said(app).split("not heard of since")[1][:120]  # on hover


def test_each_thing_that_a_server_says_is_wrong_is_an_alert_until_it_says_otherwise(
    small: House,
) -> None:
    touch(small, 77, notices={"consent": "headers are lost", "capture": f"off\nsince {PICTURE}"})
    touch(small, 78, notices={"consent": "<b>headers</b> are *lost*"})
    (told,) = [element.value for element in draw(small.home, "Now").warning]
    assert told.splitlines() == [
        f"- Server gpu-1:30000: off since {ESCAPED}",
        "- Server gpu-1:30000: headers are lost",
        r"- Server gpu-2:30000: \<b\>headers\</b\> are \*lost\*",
    ]
    for boot in (77, 78):
        touch(small, boot, notices={})
    assert not draw(small.home, "Now").warning


def test_losses_drift_switches_failed_runs_and_failed_watches_are_told(small: House) -> None:
    with store.session(small.engine) as s:
        queries.drops.add_drops(s, small.servers[77], "spool", 1234)
        queries.drifts.add_drift(
            s, small.group_id, version_id=2, domain=PICTURE, last_request_id=1,
            accept_length_before=2.1, accept_length_after=1.4, requests_before=60,
            requests_after=40,
        )  # fmt: skip
        run = queries.runs.start_run(s, small.group_id, trigger="drift")
        queries.runs.finish_run(s, run.id, "failed", error=f"no trace {PICTURE}")
        for watch in queries.watches.watches(s, small.group_id):
            queries.watches.end_watch(s, watch, "failed", "accept length 1.31 below 1.52")
    turn(small.engine, "default", "learning", False, actor="eve", reason=PICTURE)
    app = draw(small.home, "Now")
    (severe,) = [element.value for element in app.error]
    assert "The watch over version 2 failed" in severe and "1.31 below 1.52" in severe
    (rest,) = [element.value for element in app.warning]
    for words in (
        "1,234 at the spool", "fell from 2.10 to 1.40", "Learning is switched off by eve",
        "The last training run (1) failed: no trace",
    ):  # fmt: skip
        assert words in rest, words
    # What clients and people wrote stays text: no picture of another machine is asked for.
    assert rest.count(ESCAPED) == 3 and PICTURE not in rest


def test_an_alert_of_losses_counts_records_and_traces_apart_and_ends_a_day_after_the_last(
    small: House,
) -> None:
    with store.session(small.engine) as s:
        queries.drops.add_drops(s, small.servers[77], "rejected", 7)
        queries.drops.add_drops(s, small.servers[77], queries.drops.STORED_LATER, 5)
        queries.drops.add_drops(s, small.servers[77], "trace", 3)
    warnings = "\n".join(one.value for one in draw(small.home, "Now").warning)
    assert "Records were lost in the last day: 2 refused by the store" in warnings
    assert "Traces were lost in the last day: 3 since the servers started" in warnings
    with small.engine.begin() as connection:
        connection.execute(
            text("UPDATE drop_count SET updated_at = :day"),
            {"day": utc_now() - timedelta(hours=25)},
        )
    assert not any("lost in the last day" in one.value for one in draw(small.home, "Now").warning)


def test_what_the_scheduler_will_do_next_and_why_is_told(small: House) -> None:
    with store.session(small.engine) as s:
        queries.scheduler_states.set_scheduler_state(
            s, small.group_id, holder="host:1", state="waiting", reason="140 of 200 new requests",
            next_action="train on 200 new requests", next_at=utc_now() + timedelta(minutes=20),
            details={},
        )  # fmt: skip
    words = said(draw(small.home, "Now"))
    assert "waiting: 140 of 200 new requests" in words
    assert "train on 200 new requests" in words and "in 20 min" in words


def test_without_drafts_or_without_timings_the_headline_claims_no_speed_up(small: House) -> None:
    for boot in small.servers:
        touch(small, boot, counters={"queue": 0.0})
    app = draw(small.home, "Now")
    assert not app.success
    assert "known once a server has measured steps" in app.info[0].value
    assert {metric.label: metric.value for metric in app.metric}["Speed-up"] == "–"  # noqa: RUF001


def test_the_speed_up_is_what_a_server_measured_by_load_where_it_did(small: House) -> None:
    counters = {"step_ms_plain": 20.0, "step_ms_spec": 26.0, "gain": 1.31}
    counters |= {"gain_1": 1.31, "gain_2": 1.12, "gain_4": 1.05, "gain_16": 0.9}
    for boot in small.servers:
        touch(small, boot, counters=counters)
    app = draw(small.home, "Now")
    assert "Speculation is faster: 1.31 times" in app.success[0].value
    metrics = {metric.label: metric for metric in app.metric}
    assert metrics["Speed-up"].value == "1.31x"
    assert metrics["Speed-up"].delta == "1.31 alone, 1.12 of 2, 1.05 of 3 to 4"
