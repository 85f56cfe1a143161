"""Tables as CSV files in which no cell is a formula: a spreadsheet would run what clients wrote."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

#: What a spreadsheet takes for the begin of a formula, also in the width of East Asian letters.
_FORMULA = frozenset("=+-@\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?")


def csv(frame: pd.DataFrame, **how: Any) -> bytes:
    """The rows and their names in UTF-8; ``how`` goes to pandas."""
    safe = frame.copy()
    for name in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            safe[name] = frame[name].map(inert, na_action="ignore")
    safe.columns = [inert(str(name)) for name in frame.columns]
    text: str = safe.to_csv(index=False, **how)
    return text.encode(errors="replace")


def inert(value: Any) -> Any:
    """A text that would be a formula, behind the apostrophe with which spreadsheets mark text;
    all else as it is, also numbers that are kept as text.

    A carriage return becomes a line feed: pandas 3.0 does not quote it, and it would end the row.
    """
    if not isinstance(value, str):
        return value
    value = value.replace("\r\n", "\n").replace("\r", "\n")
    begin = value.lstrip()[:1]
    formula = begin in _FORMULA or value[:1] in "\t\n"
    return f"'{value}" if value and formula and not _NUMBER.fullmatch(value) else value
