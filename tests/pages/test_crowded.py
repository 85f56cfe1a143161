"""Stores at their edges: 1,000 domains and 200 versions, and stores that lack a part of it all."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from aurora_sgl import rollout, store
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import IngestRules
from aurora_sgl.store.models import Evaluation
from dashboard import words
from dashboard.screens import acceptance, compare
from dashboard.version_questions import by_domain
from tests.pages.test_pages import draw, said
from tests.support import browser
from tests.support import dashboard_house as samples
from tests.support.browser import PAGES
from tests.support.dashboard_house import House

Use = Callable[..., None]
DOMAINS, VERSIONS = 1_000, 200
#: Of a page that is read by a person; a table that can be scrolled is none of it.
MOST_LINES = 250
#: What a page says of those that it has no room for.
REST = {"Now": "980 more together", "Versions": "The first 40 of 1,000.", "Worth": "980 more"}
#: Of one chart.
MOST_BYTES = 1_500_000
#: Ways to look at a page, by its name: its address, and what was chosen on it.
VIEWS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "Acceptance": [
        *(("", {"lines": lines}) for lines in (acceptance.ALL, acceptance.BY_VERSION)),
        *(("", {"lines": acceptance.BY_DOMAIN, "tab": tab}) for tab in acceptance.TABS),
    ],
    "Versions": [("", {}), ("version=3", {}), ("", {"shown": "Lineage"})],
    "Compare": [("a=2&b=3", {"compared by": tab}) for tab in compare.TABS],
    "Worth": [("", {"worth period": "90 days"})],
    "Requests": [("", {"ended": "24 hours"})],
}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A request of each domain an hour ago, and each judged apart in the newest evaluation."""
    house = samples.empty(tmp_path_factory.mktemp("crowd"))
    house.rules = IngestRules(most_domains=DOMAINS)
    names = [f"d/{number:04d}" for number in range(DOMAINS)]
    samples.add_servers(house)
    now = datetime.now(UTC).replace(microsecond=0)
    rng = random.Random(1)
    with samples.clock_at(now - timedelta(hours=30)):
        for parent in (None, 1, 2):
            samples.add_version(house, parent)
        for version in (1, 2, 3):
            rollout.promote(house.engine, version, actor="ada", reason="it is better", force=True)
    with house.together():
        for number, domain in enumerate(names):
            for version in (2, 3):
                at = now - timedelta(minutes=90 if version == 2 else 20, seconds=number % 60)
                house.serve(at, version, domain=domain, steps=3, quality=0.5, rng=rng)
    told = {domain: (number % 7) / 20 for number, domain in enumerate(names)}
    samples.judge(house, 3, 2, 1.6, 1.8, domains=told)
    many_versions(house)
    house.servers_follow()
    browser.add_accounts(house.home)
    yield house
    house.engine.dispose()


def many_versions(house: House) -> None:
    """Up to 200, each made from the one before; they never served."""
    with store.session(house.engine) as s:
        first = queries.versions.version(s, 3)
        for number in range(4, VERSIONS + 1):
            queries.versions.add_version(
                s, group_id=house.group_id, architecture=first.architecture,
                weights_uri=f"v/{number}/", weights_sha256=f"{number:064x}",
                vocab_sha256=first.vocab_sha256, draft_vocab_size=first.draft_vocab_size,
                target_model=first.target_model, source="train", parent_id=number - 1,
            )  # fmt: skip


def views(home: Path, page: str) -> Iterator[tuple[object, AppTest]]:
    for query, chosen in VIEWS.get(page, [("", {})]):
        yield (query, chosen), draw(home, page, query=query, **chosen)


@pytest.mark.parametrize("page", PAGES)
def test_a_thousand_domains_and_two_hundred_versions_stay_a_page(
    crowd: House, settings_of: Use, page: str
) -> None:
    crowd.servers_follow()
    settings_of(crowd.home)
    everything = ""
    for view, app in views(crowd.home, page):
        text = said(app)
        everything += text
        rows = text.count("<tr") + text.count("\n- ")
        assert rows < MOST_LINES, f"{rows} rows on a page of a person: {view}"
        named = sum(f"d/{number:04d}" in text for number in range(DOMAINS))
        assert named < MOST_LINES, view
        for chart in app.get("plotly_chart"):
            assert len(chart.proto.spec) < MOST_BYTES, view
    assert REST.get(page, "") in everything


def test_the_one_domain_that_failed_is_shown_wherever_a_list_is_cut(
    crowd: House, settings_of: Use
) -> None:
    settings_of(crowd.home)
    with store.session(crowd.engine) as s:
        row = next(e for e in queries.evaluations.evaluations(s, 3) if not e.domain)
        told = dict(row.details["by_domain"])
        told["d/0777"] = {**told["d/0777"], "verdict": "fail"}
        row.details = {**row.details, "by_domain": told}
    replay = draw(crowd.home, "Compare", query="a=2&b=3", **{"compared by": "Replay"})
    for app in (replay, draw(crowd.home, "Versions", query="version=3")):
        assert "d/0777" in said(app)


def test_tables_of_what_is_not_by_domain_stay_whole(
    house: House, settings_of: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked for some of the servers, or of the days."""
    monkeypatch.setattr(words, "MOST_ROWS", 1)
    settings_of(house.home)
    for page in PAGES:
        assert "The first 1 of" not in said(draw(house.home, page)) or page == "Versions", page


def test_of_many_domains_those_that_speak_against_a_version_stand_first() -> None:
    verdicts = {7: "fail", 500: "inconclusive", 900: "fail"}
    told = {
        f"d/{number:04d}": {"verdict": verdicts.get(number, "pass"), "requests": number}
        for number in range(DOMAINS)
    }
    rows = by_domain(Evaluation(details={"by_domain": told}))
    assert [row["domain"] for row in rows[:5]] == ["d/0900", "d/0007", "d/0500", "d/0999", "d/0998"]
    few = by_domain(Evaluation(details={"by_domain": dict(list(told.items())[:8])}))
    assert [row["domain"] for row in few] == [f"d/{number:04d}" for number in range(8)]


# -- half of it is there --------------------------------------------------------------------------

#: Tables that are emptied together: one without the other can't be.
MISSING = (
    ("evaluation",),
    ("alias",),
    ("training_run",),
    ("acceptance_minute",),
    ("acceptance_hour",),
    ("acceptance_minute", "acceptance_hour"),
    ("acceptance_event",),
    ("request", "request_tally", "training_request", "trace"),
    ("server", "swap"),
    ("scheduler_state",),
    ("watch", "watch_window"),
    ("switch",),
    ("lease",),
    ("retention_limit",),
    ("alert", "notification", "delivery", "notification_start"),
    ("version_note",),
)


@pytest.mark.parametrize("tables", MISSING, ids="+".join)
def test_every_page_is_drawn_without_a_part_of_the_store(
    house: House, tmp_path: Path, settings_of: Use, tables: tuple[str, ...]
) -> None:
    with (
        closing(sqlite3.connect(house.home / "aurora.db")) as whole,
        closing(sqlite3.connect(tmp_path / "aurora.db")) as part,
    ):
        whole.backup(part)
        for table in tables:  # what refers to it stays, as no foreign key is looked at
            part.execute(f"DELETE FROM {table}")
        part.commit()
    settings_of(tmp_path)
    for page in PAGES:
        query = "version=4" if page == "Versions" else "a=2&b=3" if page == "Compare" else ""
        assert len(said(draw(tmp_path, page, query=query))) > len(page) + 40, page
