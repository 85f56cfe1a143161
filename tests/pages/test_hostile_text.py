"""What clients and people write is text on every page, in every chart and in every file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import streamlit as st
from markdown_it import MarkdownIt
from streamlit.testing.v1 import AppTest

from aurora_sgl.engine import clean
from aurora_sgl.store.models import Deployment
from aurora_sgl.store.queries.trends import ServedCounts
from dashboard import charts, exports, words
from dashboard.screens import acceptance
from tests.pages.test_pages import draw
from tests.support import hostile
from tests.support.browser import PAGES

Use = Callable[..., None]
NAMES = hostile.cleaned()
#: Tags that our own markup has.
OURS = {"style", "table", "thead", "tbody", "tr", "th", "td", "span", "div", "time", "p", "b", "br",
        "ul", "li", "small", "nav", "a"}  # fmt: skip
#: Where our links lead: a page of ours, whose parameters are encoded.
OWN_PAGE = re.compile(r"/[a-z]*(\?[A-Za-z0-9_.-]+=[\w%+.~*-]*(&[A-Za-z0-9_.-]+=[\w%+.~*-]*)*)?")
BEGIN = datetime(2026, 11, 24, tzinfo=UTC)
SERVED = ServedCounts(4, 40, 120, 50, 90, 420, 640, 500)
#: What plotly would do something about: tags, templates, dollars.
ACTIVE = re.compile(r"<[^>]*>|%\{[^}]*\}|\$")


# -- files ---------------------------------------------------------------------------------------


def test_no_cell_of_a_csv_file_is_a_formula_and_none_loses_its_text() -> None:
    texts = [text for text in hostile.texts() if text.encode(errors="ignore").decode() == text]
    frame = pd.DataFrame({"domain": texts, "n": range(len(texts)), "=head": texts})
    rows = list(csv.reader(io.StringIO(exports.csv(frame).decode(), newline="")))
    assert rows[0] == ["domain", "n", "'=head"]
    assert len(rows) == len(texts) + 1
    for row, text in zip(rows[1:], texts, strict=True):
        for cell in (row[0], row[2]):
            kept = text.replace("\r\n", "\n").replace("\r", "\n")
            assert cell.removeprefix("'") == kept.removeprefix("'")
            assert not re.match(r"\s*[=+\-@\uff1d]|[\t\r\n]", cell), cell


@pytest.mark.parametrize("value", ["-1", "+2.5", "1e-3", "-1.5E+10", "chat", "a=b", "", "é"])
def test_what_is_no_formula_is_exported_as_it_is(value: str) -> None:
    assert exports.inert(value) == value


# -- charts --------------------------------------------------------------------------------------


def figures(name: str) -> Iterator[Any]:
    points = [(BEGIN, SERVED), (BEGIN + timedelta(minutes=1), SERVED)]
    made = Deployment(action="promote", version_id=2, previous_version_id=1, actor=name,
                      generation=1, reason=name, created_at=BEGIN)  # fmt: skip
    yield charts.trend({name: points}, timedelta(minutes=1), [made])
    yield charts.histogram({name: [1, 2]})
    yield charts.positions({name: [1]}, {name: 3})
    yield charts.heat([name], ["00h"], {(name, "00h"): SERVED})
    yield charts.curves({name: [(0.0, 1.0)]}, "updates", "loss")
    for kind in ("bars", "line", "points"):
        yield charts.plain([name, name], [1, 2], name, name, kind)


def active(figure: Any) -> set[str]:
    return {found for text in _strings(json.loads(figure.to_json())) for found in
            ACTIVE.findall(text)}  # fmt: skip


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def test_hostile_text_in_a_chart_adds_nothing_that_is_interpreted() -> None:
    plain = [active(figure) | {"<br>"} for figure in figures("chat")]
    for begin in range(6):  # a figure takes a tenth of a second
        name = " ".join(NAMES[begin::6])
        for figure, expected in zip(figures(name), plain, strict=True):
            assert active(figure) <= expected
    for name in NAMES:
        for text in (charts.label(name), charts.literal(name)):
            assert {*ACTIVE.findall(text)} <= {"<br>"}, name


# -- pages ---------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def of_markdown(text: str) -> Tags:
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return Tags(markdown.render(text))


def wrong_in_markup(markup: str) -> list[str]:
    return [
        f"<{tag} {attributes}>"
        for tag, attributes in Tags(markup).tags
        if tag not in OURS or any(name.startswith("on") or name == "src"
                                  or (name == "href" and not OWN_PAGE.fullmatch(str(value)))
                                  for name, value in attributes.items())
    ]  # fmt: skip


def wrong_in_markdown(text: str) -> list[str]:
    """What Streamlit would make of it: links, pictures, signs, formulas."""
    wrong = [tag for tag, attributes in of_markdown(text).tags
             if hostile.HOST in str(attributes)
             or tag in ("img", "script", "iframe", "svg")]  # fmt: skip
    wrong += re.findall(rf"https?://{hostile.HOST}|www\.{hostile.HOST}|\w@{hostile.HOST}", text)
    return wrong + re.findall(r":smile:|:material/home:|(?<!\\)\$|:red(?=\[)", text)


def test_text_of_others_in_markdown_is_that_text_on_one_line() -> None:
    for name in NAMES:
        tags = of_markdown(words.literal(name))
        assert [tag for tag, _ in tags.tags] in ([], ["p"]), name
        text = "".join(tags.words).strip().replace("\u2060", "")
        assert text == " ".join(name.split()), name
        assert not wrong_in_markdown(words.literal(name)), name


def test_text_of_others_in_markup_is_that_text() -> None:
    for name in NAMES:
        for markup in (words.cell(name), words.joined("by ", name).markup):
            assert not Tags(markup).tags
        assert "".join(Tags(words.cell(name)).words) == (name or words.NONE)


STATEMENT = "SELECT domain, rid, conversation_hash, count(*) AS n FROM request GROUP BY 1, 2, 3"
#: Every page, in each of the states in which it shows something of others.
STATES: list[tuple[str, dict[str, Any]]] = [
    *((page, {}) for page in PAGES if page not in ("Acceptance", "SQL")),
    *(("Acceptance", {"tab": tab, "lines": acceptance.BY_DOMAIN}) for tab in acceptance.TABS),
    ("Acceptance", {"domains": NAMES[3:60:8], "lines": acceptance.ALL}),
    ("Versions", {"shown": "Lineage"}),
    ("Requests", {"domain": NAMES[5:300:40]}),
    ("Requests", {"request": NAMES[7]}),
    ("SQL", {"statement": STATEMENT}),
]


@pytest.mark.parametrize(("page", "state"), STATES)
def test_hostile_text_on_a_page_adds_nothing_that_is_interpreted(
    among_hostile: Path, files: dict[str, str], page: str, state: dict[str, Any]
) -> None:
    app = draw(among_hostile, page, **state)
    if page == "SQL":
        next(one for one in app.button if one.label == "Run").click().run()
        assert not app.exception and app.dataframe
    if page == "Requests" and "request" not in state:
        assert len(app.dataframe[0].value) == len(state.get("domain", range(200)))
    assert_inert(app)
    for element in app.get("plotly_chart"):
        assert json.loads(element.proto.spec)["data"]
    assert bool(files) == (page == "SQL" or state.get("tab") == "The same numbers")
    for text in files.values():
        assert_inert_csv(text)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each download button of the page gives, by its name."""
    files: dict[str, str] = {}
    button = st.download_button

    def also_kept(label: str, data: bytes, name: str, *more: Any, **how: Any) -> bool:
        files[name] = data.decode()
        return button(label, data, name, *more, **how)

    monkeypatch.setattr(st, "download_button", also_kept)
    return files


def assert_inert_csv(text: str) -> None:
    """Names of clients stand in it, whole, and no cell is a formula or has a control character."""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    cells = {cell for row in rows for cell in row}
    assert len(cells & {exports.inert(name) for name in NAMES}) >= acceptance.MOST
    assert {len(row) for row in rows} == {len(rows[0])}
    for cell in cells:
        assert exports.inert(cell) == cell and clean.text(cell, len(cell)) == cell


def assert_inert(app: AppTest) -> None:
    for element in app.get("html"):
        assert not wrong_in_markup(element.proto.body)
    for kind in ("title", "header", "subheader", "markdown", "caption", "info", "warning", "error",
                 "success"):  # fmt: skip
        for element in app.get(kind):
            assert not wrong_in_markdown(element.value), element.value
    for element in app.get("plotly_chart"):
        for text in _strings(json.loads(element.proto.spec)):
            found = set(ACTIVE.findall(text))
            assert not {one for one in found if hostile.HOST in one or one.startswith("$")}, text
