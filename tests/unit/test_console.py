"""Tables are read at any width: a number is never cut or broken, whatever stands beside it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from aurora_sgl.console import print_cells, print_table

NUMBERS = {"tokens/s without drafts": 123456.789, "ratio": 1.234, "accept length": 2.345}
TEXT = "a sentence about the drafter that is longer than any column"


def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, *rows: Any
) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("Speed", {name: name for name in rows[0]}, rows)
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("columns", [1, 3, 6, 12])
def test_every_number_is_whole_at_any_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, columns: int
) -> None:
    row = {"name": TEXT, **{f"number {n}": n + 0.123 for n in range(columns)}}
    output = printed(capsys, monkeypatch, width, row, row)
    for number in range(columns):
        assert len(re.findall(rf"(?<!\d){number}\.123(?!\d)", output)) == 2
    assert "…" not in output


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_of_a_table_is_wider_than_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    output = printed(capsys, monkeypatch, width, {"version": TEXT, **NUMBERS})
    if "│" in output:
        assert max(map(len, output.splitlines())) <= width
    assert "123456.789" in output and "1.234" in output and "2.345" in output


def test_a_table_that_fits_is_a_table_and_one_that_does_not_is_a_list(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "│" in printed(capsys, monkeypatch, 80, NUMBERS)
    below = printed(capsys, monkeypatch, 30, NUMBERS)
    assert "│" not in below
    assert re.search(r"^  ratio +1\.234$", below, re.MULTILINE)


def test_brackets_are_text_and_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_cells("Times", ["[bold]what", "median"], [["[red]one", "1.50"]], [False, True])
    output = capsys.readouterr().out
    assert "[red]one" in output and "[bold]what" in output and "1.50" in output
