"""Markup is never cut nor escaped, text always is, and values that change nothing say so."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dashboard import sampling, words
from dashboard.words import Html

MOMENT = datetime(2026, 11, 27, 10, 18, 52, tzinfo=UTC)
MARKUP = [words.time(MOMENT), words.since(MOMENT), words.lasting(MOMENT),
          words.between(MOMENT, MOMENT + timedelta(hours=1)),
          words.joined("run <3>, ", MOMENT, ", ", None)]  # fmt: skip


@pytest.mark.parametrize("piece", MARKUP)
def test_markup_is_no_string_and_where_text_is_wanted_it_is_its_text(piece: Html) -> None:
    with pytest.raises(TypeError):
        piece[:-4]  # type: ignore[index]
    with pytest.raises(TypeError):
        piece + " ago"  # type: ignore[operator]
    assert "<time" in piece.markup and words.cell(piece) == piece.markup
    assert words.joined(piece).markup == piece.markup  # not escaped a second time
    text = f"{piece}"
    assert text and "<time" not in text and "title=" not in text and "&lt;" not in text


def test_text_beside_markup_is_text() -> None:
    found = words.joined("<b>x</b> & ", words.Html("<b>y</b>"), MOMENT)
    assert found.markup.startswith("&lt;b&gt;x&lt;/b&gt; &amp; <b>y</b><time ")
    assert str(words.joined("a < b ", words.Html("<i>c</i>"))) == "a < b c"


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ({"top_k": 1 << 30}, "top_k off"),
        ({"top_k": -1}, "top_k off"),
        ({"top_k": 40}, "top_k 40"),
        ({"top_p": 1.0}, "top_p off"),
        ({"top_p": 0.95}, "top_p 0.95"),
        ({"min_p": 0.0}, "min_p off"),
        ({"min_p": -1}, "min_p off"),
        ({"min_p": 0.05}, "min_p 0.05"),
        ({"temperature": 0.0}, "temperature greedy"),
        ({"temperature": 1.0, "top_k": 1}, "temperature greedy, top_k 1"),
        ({"temperature": 0.7}, "temperature 0.7"),
        ({"max_new_tokens": 1 << 30}, "max_new_tokens no limit"),
        ({"max_new_tokens": None}, "max_new_tokens no limit"),
        ({"max_new_tokens": 64}, "max_new_tokens 64"),
        ({"min_new_tokens": 0}, "min_new_tokens off"),
        ({"repetition_penalty": 1.0}, "repetition_penalty off"),
        ({"presence_penalty": -1}, "presence_penalty -1"),
        ({"frequency_penalty": 0.0}, "frequency_penalty off"),
        ({"grammar": True, "logit_bias": False}, "grammar on, logit_bias off"),
        ({}, ""),
    ],
)
def test_sampling_values_that_change_nothing_say_so(recorded: dict[str, Any], said: str) -> None:
    assert sampling.told(recorded) == said
