"""What a client can set, made safe where it enters our records.

A client can send half of a surrogate pair, NUL, a text of megabytes, NaN or a number of hundreds of
digits. None of it fits every encoding on the way (msgpack, JSON, both databases), and none of it is
worth a record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aurora_sgl import client_text
from aurora_sgl.client_text import MAX_TEXT

_MAX_ITEMS = 64
_MAX_DEPTH = 4
_LARGEST = (1 << 63) - 1  # what msgpack and both databases hold


def text(value: object, most: int = MAX_TEXT) -> str:
    """The first ``most`` characters of a text, those replaced that cannot be stored or printed."""
    return client_text.clean(value if isinstance(value, str) else _words(value), most)


def integer(value: object) -> int:
    """A whole number that every store holds; 0 for what is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return 0
    try:
        number = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return 0
    return max(-_LARGEST, min(int(number), _LARGEST))


def value(content: Any, depth: int = 0) -> Any:
    """Anything as what JSON knows, without numbers that are not finite, short and not deep."""
    if content is None or isinstance(content, bool):
        return content
    if isinstance(content, int):
        return integer(content)
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if depth < _MAX_DEPTH and isinstance(content, Mapping):
        items = list(content.items())[:_MAX_ITEMS]
        return {text(name): value(item, depth + 1) for name, item in items}
    if depth < _MAX_DEPTH and isinstance(content, list | tuple):
        return [value(item, depth + 1) for item in content[:_MAX_ITEMS]]
    return text(content)


def _words(content: object) -> str:
    try:
        return str(content)
    except Exception:  # such as an integer of more digits than Python prints
        return f"a {type(content).__name__} that cannot be printed"
