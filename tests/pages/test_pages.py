"""What the pages say, drawn by Streamlit's own test runner."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from aurora_sgl import rollout, store
from aurora_sgl.store import queries
from aurora_sgl.store.accounts import Accounts
from aurora_sgl.store.liveness import training_lease_name
from aurora_sgl.store.queries.trends import ServedCounts, TrendPoint
from dashboard import buckets, dialogs, login, version_questions
from dashboard.context import Group
from dashboard.screens import acceptance, training
from tests.support import browser
from tests.support import dashboard_house as samples
from tests.support.browser import PAGES
from tests.support.dashboard_house import House

APP = Path(__file__).parents[2] / "dashboard" / "app.py"
Use = Callable[..., None]


def draw(home: Path, page: str, name: str = "ada", *, query: str = "", **state: object) -> AppTest:
    """A page as somebody who is logged in sees it; ``query``: the parameters of its address."""
    accounts = Accounts(home / "dashboard" / "accounts.db")
    if accounts.get(name) is None:
        browser.add_accounts(home)
    app = AppTest.from_file(str(APP), default_timeout=60)
    app.session_state["session_token"] = accounts.open_session(name)
    user = accounts.get(name)
    assert user is not None
    app.session_state[login.OWNER] = (name, user.role)  # what follows was kept for this account
    for key, value in state.items():
        app.session_state[key] = value
    for key, values in parse_qs(query).items():
        app.query_params[key] = values
    app._page_hash = "" if page == "Now" else calc_hash(page.lower())
    app.run()
    assert not app.exception, app.exception
    return app


def agree(app: AppTest, make: object, reason: str) -> AppTest:
    """Give a reason in the open dialog and press its button. The test runner always draws the
    whole page, which would close the dialog: it is asked for again."""
    next(one for one in app.text_input if one.label == "Reason").set_value(reason)
    app.session_state[dialogs.ASKED] = make
    buttons = [one for one in app.button if one.form_id]
    buttons[-1].click().run()
    assert not app.exception, app.exception
    return app


def said(app: AppTest) -> str:
    """All the words on the page, also those of small tables."""
    kinds = ("title", "header", "subheader", "markdown", "caption", "info", "warning", "error",
             "success", "code")  # fmt: skip
    words = [element.value for kind in kinds for element in app.get(kind)]
    words += [element.proto.body for element in app.get("html")]
    return "\n".join(words)


# -- when there is nothing, or not yet, or no longer ---------------------------------------------


def test_without_an_account_no_page_shows_anything_of_the_store(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    for page in PAGES:
        app = AppTest.from_file(str(APP), default_timeout=60)
        app._page_hash = "" if page == "Now" else calc_hash(page.lower())
        app.session_state["session_token"] = "guess"
        app.run()
        assert [element.value for element in app.title] == ["Aurora-SGL"]
        assert not app.dataframe and not app.metric and "version" not in said(app)


def test_a_store_without_tables_says_how_they_are_made(tmp_path: Path, settings_of: Use) -> None:
    settings_of(tmp_path)
    for page in PAGES:
        assert "aurora-sgl db upgrade" in said(draw(tmp_path, page))


def test_an_empty_store_says_how_to_start(tmp_path: Path, settings_of: Use) -> None:
    settings_of(tmp_path)
    engine = store.connect(f"sqlite:///{tmp_path / 'aurora.db'}")
    store.upgrade(engine)
    engine.dispose()
    for page in PAGES:
        words = said(draw(tmp_path, page))
        assert "Nothing was served yet" in words and "make demo" in words


def test_a_group_without_versions_and_requests_says_so_on_every_page(
    tmp_path: Path, settings_of: Use
) -> None:
    samples.empty(tmp_path).engine.dispose()
    settings_of(tmp_path)
    expected = {
        "Now": "No request was served yet",
        "Alerts": "Nothing was written down",
        "Acceptance": "No verify step was recorded yet",
        "Versions": "There is no version yet",
        "Compare": "There is no version yet; two can be compared",
        "Training": "No run was made yet",
        "Worth": "No request was served yet, and no run trained",
        "Requests": "No request was served yet",
        "SQL": "One statement that reads",
        "Audit": "Nothing was promoted",
    }
    for page, words in expected.items():
        assert words in said(draw(tmp_path, page))
    assert "No server runs" in said(draw(tmp_path, "Now"))


def test_one_version_that_never_served_is_no_reason_to_fail(
    tmp_path: Path, settings_of: Use
) -> None:
    house = samples.empty(tmp_path)
    first = samples.add_version(house)
    rollout.promote(house.engine, first, actor="system", reason="first")
    house.engine.dispose()
    settings_of(tmp_path)
    words = said(draw(tmp_path, "Versions")) + said(draw(tmp_path, "Versions", shown="Lineage"))
    assert "It was never compared with another version." in words
    assert "No server runs; a promotion reaches servers when they start." in words
    assert "Drawn once a version was replayed" in words
    app = draw(tmp_path, "Versions")
    assert {b.label: b.disabled for b in app.button}["Roll back"]  # there is no earlier one


def test_a_database_that_is_away_is_said_in_words_with_what_to_do(
    tmp_path: Path, settings_of: Use
) -> None:
    settings_of(tmp_path, database_url="postgresql://aurora:secret@127.0.0.1:9/aurora")
    for page in PAGES:
        app = draw(tmp_path, page)
        words = said(app)
        assert "The store can't be read" in words and "check AURORA_DATABASE_URL" in words
        assert "secret" not in words
        assert {button.label for button in app.button} == {"Log out", "Try again"}


def test_a_database_that_goes_away_while_a_page_is_open_is_said_there(
    house: House, settings_of: Use, tmp_path: Path
) -> None:
    home = tmp_path / "gone"
    filled = samples.empty(home)
    settings_of(home)
    app = draw(home, "Now")
    with filled.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alias")
    filled.engine.dispose()
    app.run()
    assert not app.exception
    assert "The store did not answer (no such table: alias)" in app.error[0].value


# -- numbers -----------------------------------------------------------------------------------


def test_versions_are_compared_in_one_draft_shape(house: House, settings_of: Use) -> None:
    settings_of(house.home)
    app = draw(house.home, "Acceptance", period="30 days", tab="Versions at equal draft shape")
    assert not app.exception
    drawn = said(app)
    assert "depth, top-k and nodes" in drawn and "not known" not in drawn


def test_the_pages_show_the_numbers_of_the_store(house: House, settings_of: Use) -> None:
    settings_of(house.home)
    app = draw(house.home, "Acceptance", lines=acceptance.ALL, period="30 days")
    app_table = draw(house.home, "Acceptance", period="30 days", tab="The same numbers")
    frame = app_table.dataframe[0].value
    with store.session(house.engine, write=False) as s:
        lengths = {
            r.version_id: r
            for r in queries.accept_lengths.accept_length_by_version(s, house.group_id)
        }
    for version, expected in lengths.items():
        rows = frame[frame["line"] == f"version {version}"]
        assert rows["verify steps"].sum() == expected.verify_steps
        assert rows["accepted"].sum() == expected.accepted
        assert rows["requests"].sum() == expected.requests
    assert "Nothing" not in said(app)
    now = draw(house.home, "Now")
    metrics = {metric.label: metric.value for metric in now.metric}
    assert metrics["Live version"] == "3"
    length = float(metrics["Accept length"])
    assert (
        metrics["Speed-up"] == f"{length / 1.3:.2f}x"
        or abs(float(metrics["Speed-up"][:-1]) - length / 1.3) < 0.01
    )
    # The store may be older than what counts as now; then the headline speaks of the last traffic.
    headline = [*now.success, *now.info][0].value
    speed = "times the speed of decoding without it" if now.success else "times the speed without"
    assert speed in headline and f"{length:.2f}" in headline


def test_histogram_and_positions_agree_with_the_accept_length(
    house: House, settings_of: Use
) -> None:
    from aurora_sgl.store.queries import trends

    with store.session(house.engine, write=False) as s:
        wanted = trends.Filter(house.group_id)
        points = trends.trend(s, wanted, "hour", with_histogram=True)
        assert trends.by(points, lambda p: p.version_id) == trends.by(
            trends.trend(s, wanted, "minute"), lambda p: p.version_id
        )
    for version, counts in trends.histograms(points, lambda p: p.version_id).items():
        served = trends.total(p for p in points if p.version_id == version)
        assert sum(counts) == served.verify_steps
        assert sum(i * count for i, count in enumerate(counts)) == served.accepted
        reached = acceptance._reached(counts)
        assert served.accept_length == pytest.approx(1 + sum(reached) / sum(counts))


def test_days_that_are_read_once_and_the_rest_add_up_to_the_whole(
    house: House, settings_of: Use
) -> None:
    from aurora_sgl.store.queries import trends
    from dashboard import data

    settings_of(house.home)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    wanted = trends.Filter(house.group_id, hour - timedelta(days=3), hour + timedelta(hours=1))
    cut = hour - timedelta(hours=1)
    parts = list(data._parts(wanted, cut))
    assert (parts[0].since, parts[-1].until) == (wanted.since, wanted.until)
    assert all(a.until == b.since for a, b in pairwise(parts)) and cut in {p.since for p in parts}
    assert sum(p.until - p.since == data.DAY for p in parts) >= 2
    with store.session(house.engine, write=False) as s:
        whole = trends.trend(s, wanted, "hour", with_histogram=True)
    found = data.long_trend(house.url, wanted, "hour", cut)
    assert trends.total(found) == trends.total(whole) and trends.total(whole).requests
    for key in (lambda p: p.version_id, lambda p: (p.domain, p.bucket)):
        assert trends.by(found, key) == trends.by(whole, key)
    by_version = trends.histograms(whole, lambda p: p.version_id)
    for version, counts in trends.histograms(found, lambda p: p.version_id).items():
        assert counts == by_version[version][: len(counts)] and sum(counts) == sum(
            by_version[version]
        )


@pytest.mark.parametrize(
    ("span", "bucket", "points"),
    [
        (timedelta(hours=1), "minute", 62),
        (timedelta(hours=24), "10 minutes", 146),
        (timedelta(days=7), "hour", 170),
        (timedelta(days=365), "hour", 182),
    ],
)
def test_a_period_is_drawn_with_some_two_hundred_points_at_most(
    span: timedelta, bucket: str, points: int
) -> None:
    until = datetime(2026, 11, 24, 12, 34, 56, tzinfo=UTC)
    found = acceptance.period(until - span, until)
    assert found.bucket == bucket
    assert (found.until - found.since) / found.width <= points
    assert found.since <= until - span and found.until >= until


@pytest.mark.parametrize(("domains", "factor"), [(1, 1), (2, 2), (5, 4), (7, 6)])
def test_many_lines_are_drawn_with_fewer_points_each(domains: int, factor: int) -> None:
    until = datetime(2026, 11, 24, tzinfo=UTC)
    month = acceptance.period(until - timedelta(days=30), until)
    points = [
        TrendPoint(until - timedelta(hours=hour), 1, f"d{domain}", 3, 4, 8, ServedCounts(1, 1))
        for hour in range(1, 721)
        for domain in range(domains)
    ]
    wider = acceptance.coarser(month, points, lambda point: point.domain)
    assert wider.width == factor * month.width
    drawn = acceptance._series(
        points,
        acceptance.ChartChoice(wider, acceptance.BY_DOMAIN, points, False),
        lambda p: p.domain,
    )
    assert sum(map(len, drawn.values())) <= buckets.MOST_POINTS + domains
    assert sum(served.requests for line in drawn.values() for _, served in line) == len(points)


# -- who may act -------------------------------------------------------------------------------


def test_a_viewer_who_asks_all_the_same_is_refused_on_the_server(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    here = Group(house.url, house.group_id, "default")
    questions = version_questions.Questions(here, 4, 3)
    for make in (questions.promote, questions.rollback, questions.pin, questions.export,
                 training.Turn(here, "learning", True).ask, training.Start(here).ask):  # fmt: skip
        page = "Training" if make.__self__.__class__ is not version_questions.Questions else (
            "Versions")  # fmt: skip
        app = draw(house.home, page, "vera", **{dialogs.ASKED: make})
        assert "vera is a viewer and may look only" in said(app)
        assert "Reason" not in {one.label for one in app.text_input}  # nothing to agree to
    assert house.live() == 3


def test_an_operator_who_became_a_viewer_meanwhile_is_refused(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    here = Group(house.url, house.group_id, "default")
    make = version_questions.Questions(here, 4, 3).promote
    # Somebody of this test only: a change of an account ends its logins, also in the browsers.
    accounts = Accounts(house.home / "dashboard" / "accounts.db")
    accounts.add("olga", "operator", "a long enough one")
    app = draw(house.home, "Versions", "olga", **{dialogs.ASKED: make})
    accounts.add("olga", "viewer", "another word 12")
    agree(app, make, "quickly")
    assert house.live() == 3
    assert [element.value for element in app.title] == ["Aurora-SGL"]  # the login


def test_evidence_that_does_not_speak_for_a_version_needs_a_second_yes(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    here = Group(house.url, house.group_id, "default")
    make = version_questions.Questions(here, 5, 3).promote
    app = draw(house.home, "Versions", "ada", **{dialogs.ASKED: make})
    assert "The newest comparison says inconclusive." in said(app)
    agree(app, make, "I want it")
    assert "tick the box if you are sure" in said(app)
    assert house.live() == 3


def test_training_does_not_start_while_another_run_holds_the_lease_or_learning_is_off(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    here = Group(house.url, house.group_id, "default")

    def attempt() -> str:
        make = training.Start(here).ask
        app = draw(house.home, "Training", "ada", **{dialogs.ASKED: make})
        return said(agree(app, make, "new prompts"))

    with store.session(house.engine) as s:
        token = queries.leases.acquire_lease(
            s, training_lease_name(house.group_id), "elsewhere", 60
        )
    assert "a training run of this group is going on" in attempt()
    with store.session(house.engine) as s:
        queries.leases.release_lease(
            s, training_lease_name(house.group_id), "elsewhere", token or 0
        )
    turn = rollout.switches.turn
    turn(house.engine, "default", "learning", False, actor="test", reason="quiet")
    try:
        assert "learning is switched off" in attempt()
    finally:
        turn(house.engine, "default", "learning", True, actor="test", reason="as before")
