"""Worth shows the sums of the store, money only where both prices are given, and losses as such."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aurora_sgl import store
from aurora_sgl.store import queries
from tests.pages.test_pages import draw, said
from tests.support.dashboard_house import House

Use = Callable[..., None]
TOGETHER = """SELECT sum(verify_steps), sum(completion_tokens) FROM acceptance_minute
WHERE depth > 0"""
PRICES = {"price_server_hour": "36000", "price_training_hour": "3600", "price_currency": "<b>€"}


def test_the_page_about_worth_shows_the_sums_of_the_store(house: House, settings_of: Use) -> None:
    settings_of(house.home)
    with store.reading(house.engine) as connection:
        steps, tokens = connection.exec_driver_sql(TOGETHER).one()
    app = draw(house.home, "Worth")
    metrics = {metric.label: metric.value for metric in app.metric}
    assert metrics["Steps saved"] == f"{tokens - steps:,}" and "Money" not in str(metrics)
    words = said(app)
    assert "give `AURORA_PRICE_SERVER_HOUR` and `AURORA_PRICE_TRAINING_HOUR`" in words
    assert "seconds saved = sum of" in words and "Europe" not in words  # the runner's zone is UTC
    seconds = tokens * 0.020 - steps * 0.026  # one request at once, see dashboard_house
    settings_of(house.home, **PRICES)
    app = draw(house.home, "Worth")
    runs = queries.runs
    with store.session(house.engine, write=False) as s:
        every = [one for one in runs.runs(s, house.group_id) if one.finished_at]
    trained = sum((one.finished_at - one.started_at).total_seconds() for one in every)  # type: ignore[operator]
    money = next(metric for metric in app.metric if metric.label.startswith("Money"))
    assert float(money.value.replace(",", "")) == pytest.approx(10 * seconds - trained, abs=0.02)
    assert money.label == "Money, \\<b\\>€"


def test_a_server_that_timed_no_steps_claims_no_seconds(house: House, settings_of: Use) -> None:
    settings_of(house.home, **PRICES)
    kept = {}
    with store.session(house.engine) as s:
        for row in queries.servers.servers(s, house.group_id):
            kept[row.id] = dict(row.counters)
            row.counters = (
                {"step_ms_1_0_1": 20.0, "step_ms_1_3_6": 90.0} if row.boot_id == 77 else {}
            )
    try:
        app = draw(house.home, "Worth")
        shown = {metric.label: metric for metric in app.metric}
        assert shown["Server time saved"].delta == "a loss: drafts cost more than they saved"
        assert shown["Server time saved"].value.startswith("-")
        assert "Not measured: " in said(app) and "left out of seconds and money" in said(app)
    finally:
        with store.session(house.engine) as s:
            for row in queries.servers.servers(s, house.group_id):
                row.counters = kept[row.id]
