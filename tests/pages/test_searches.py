"""Requests and the audit are found by what they are; what text is shown follows the settings."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import text
from streamlit.testing.v1 import AppTest

from aurora_sgl import rollout, store
from aurora_sgl.store import queries
from aurora_sgl.store.queries import explorer
from tests.pages.test_pages import draw, said
from tests.support.dashboard_house import House

Use = Callable[..., None]


def rows(app: AppTest) -> list[dict[str, object]]:
    found: list[dict[str, object]] = app.dataframe[0].value.to_dict("records")
    return found


def test_requests_are_found_by_time_domain_version_and_accept_length(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    everything = rows(draw(house.home, "Requests", ended="ever"))
    assert {row["domain"] for row in everything} == {"chat", "code", "sql"}
    lately = rows(draw(house.home, "Requests", ended="1 hour"))
    assert 0 < len(lately) < len(everything)
    assert min(row["ended"] for row in lately) > min(row["ended"] for row in everything)
    chosen = {"domain": ["code"], "served_by": 2, "lengths": (1.5, 2.0)}
    found = rows(draw(house.home, "Requests", ended="ever", **chosen))
    expected = [
        row["request"] for row in everything
        if row["domain"] == "code" and row["versions"] == "2" and 1.5 <= row["accept length"] <= 2.0
    ]  # fmt: skip
    assert expected and [row["request"] for row in found] == expected
    none = draw(house.home, "Requests", ended="ever", lengths=(8.0, 9.0))
    assert "No request that has ended fits all of these" in said(none)


def test_what_text_is_shown_follows_the_settings_the_request_and_the_role(
    house: House, settings_of: Use
) -> None:
    with store.session(house.engine, write=False) as s:
        newest: dict[bool, int] = {}
        for found in explorer.find_requests(s, house.group_id, limit=20):
            request = queries.requests.request(s, found.request_id)
            assert request is not None
            newest.setdefault(request.may_train, found.request_id)
    settings_of(house.home)
    shown = said(draw(house.home, "Requests", request=str(newest[True])))
    assert "Text from the target's tokenizer" in shown and "<td>depth 1</td>" in shown
    private = draw(house.home, "Requests", request=str(newest[False]))
    assert f"Request {newest[False]}" in said(private)
    assert "Counts only: the store has no tokens of a request" in said(private)
    assert "<td>depth 1</td>" not in said(private) and "output" not in private.dataframe[0].value
    with house.engine.begin() as connection:  # as AURORA_KEEP_OPTED_OUT_TOKENS would have it
        blob = text("UPDATE acceptance_event SET target_tokens = :one WHERE request_id = :id")
        connection.execute(blob, {"one": b"\7\0\0\0" * 8, "id": newest[False]})
    kept = draw(house.home, "Requests", request=str(newest[False]))
    assert "Ids only: this request's text may not be used" in said(kept)
    settings_of(house.home, show_text="false")
    hidden = draw(house.home, "Requests", request=str(newest[True]))
    assert "AURORA_SHOW_TEXT is off" in said(hidden)
    assert "output" not in hidden.dataframe[0].value and "<td>depth 1</td>" not in said(hidden)
    for number in ("12", "none", "9" * 19):
        assert "There is no request of this number" in said(
            draw(house.home, "Requests", request=number)
        )


def test_requests_are_found_by_the_rid_that_their_client_gave_them(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    with store.session(house.engine, write=False) as s:
        mine = {str(row.id) for row in queries.requests.requests_by_rid(s, "r5")}
    assert len(mine) == 2, "one of each server"
    app = draw(house.home, "Requests", request="r5", ended="ever")
    assert {row["request"] for row in rows(app)} == mine
    assert any(f"Request {one}: accept length" in said(app) for one in mine)
    never = draw(house.home, "Requests", request="r5'; --", ended="ever")
    assert "There is no request of this number" in said(never)


def test_the_audit_has_who_when_why_before_after_and_the_evidence(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    rollout.switches.turn(
        house.engine, "default", "learning", False, actor="eve", reason="![x](http://192.0.2.7)"
    )
    rollout.switches.turn(house.engine, "default", "learning", True, actor="ada", reason="again")
    app = draw(house.home, "Audit")
    newest = rows(app)[0]
    assert (newest["who"], newest["of"], newest["why"]) == ("ada", "learning: off → on", "again")
    app.text_input(key="why").set_value("192.0.2.7").run()
    (only,) = rows(app)
    assert only["who"] == "eve"
    assert '<th scope="row">why</th><td>![x](http://192.0.2.7)</td>' in said(app)
    app.text_input(key="why").set_value("replay on held-out").run()
    assert all(row["why"].startswith("replay on held-out") for row in rows(app))
    words = said(app)
    assert "version 2" in words and "version 3" in words and "evaluation" in words
