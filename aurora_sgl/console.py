"""What commands print: Rich tables for people, JSON for programs, one line for an error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from aurora_sgl import environment, logs
from aurora_sgl.clock import utc_now


def print_json(value: Any) -> None:
    """Times in ISO 8601 (UTC), not-a-number as null."""
    print(json.dumps(_plain(value), indent=2))


def print_table(
    title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], *, empty: str = ""
) -> None:
    """``columns``: heading -> key of the row. Numbers stand at the right, times in UTC."""
    if not rows:
        print(empty or f"{title}: none")
        return
    numeric = [
        all(isinstance(row.get(key), int | float | None) for row in rows)
        for key in columns.values()
    ]
    cells = [[text_of(row.get(key)) for key in columns.values()] for row in rows]
    print_cells(title, list(columns), cells, numeric)


#: Characters that a column of text is left at least, before its lines are broken.
_TEXT_WIDTH = 12


def print_cells(
    title: str,
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],  # a list of texts for each row
    numeric: Sequence[bool],  # for each column: stands at the right and is never broken
) -> None:
    """A table as wide as the terminal (80 characters into a pipe). Where its numbers don't fit in
    a line, each row is printed below the other, a line a column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    least = [w if n else min(w, _TEXT_WIDTH) for w, n in zip(widths, numeric, strict=True)]
    if sum(least) + 3 * len(least) + 1 > console.width:
        _print_below(title, headings, cells)
        return
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for heading, width, number in zip(headings, widths, numeric, strict=True):
        if number:
            table.add_column(Text(heading), justify="right", no_wrap=True, min_width=width)
        else:
            table.add_column(Text(heading), overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_below(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    print(title)
    width = max(map(len, headings))
    for row in cells:
        print()
        for heading, text in zip(headings, row, strict=True):
            print(f"  {heading:<{width}}  {text}")


def text_of(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}"
    if isinstance(value, datetime):
        return f"{value:%m-%d %H:%M:%S}" if value.year == utc_now().year else f"{value:%Y-%m-%d}"
    if isinstance(value, list | tuple):
        return ", ".join(text_of(item) for item in value) or "-"
    return str(value)


def print_error(message: str) -> None:
    """One line on stderr; an object where logs are for machines."""
    line = f"aurora-sgl: {' '.join(message.split())}"
    print(logs.as_record(line) if environment.logs_as_json() else line, file=sys.stderr)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
