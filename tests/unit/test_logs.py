"""A record of a log is one line, and a terminal obeys nothing in it."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timedelta

import pytest

from aurora_sgl import logs
from tests.support import hostile


@pytest.mark.parametrize("texts", [hostile.texts(), hostile.cleaned()], ids=["raw", "cleaned"])
def test_hostile_text_in_a_log_is_one_line_of_it(texts: list[str]) -> None:
    form = logs.OneLine(logs.FORMAT)
    for text in texts:
        record = logging.LogRecord("aurora_sgl.x", logging.ERROR, "x.py", 1, "server %s: %s",
                                   (text, "gone"), None)  # fmt: skip
        line = form.format(record)
        assert line.isprintable() and len(line.splitlines()) == 1
        assert line.endswith(": gone") and " ERROR aurora_sgl.x: server " in line


def test_what_is_printable_stays_as_it_is() -> None:
    for text in ("chat", "\u5ba2\u670d", "a b", "é\\n"):
        assert logs.one_line(text) == text


def test_a_record_is_one_json_object_whatever_stands_in_it() -> None:
    record = logging.LogRecord("a.b", logging.ERROR, __file__, 1, "x %s", ('"\n\x1b\ud800',), None)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record.exc_info = sys.exc_info()
    line = logs.JsonLines().format(record)
    assert "\n" not in line and line.isascii()
    read = json.loads(line)
    assert (read["level"], read["logger"], read["process"]) == ("error", "a.b", os.getpid())
    assert read["message"] == 'x "\n\x1b\ud800' and "ValueError: two" in read["exception"]
    assert datetime.fromisoformat(read["time"]).utcoffset() == timedelta(0)
