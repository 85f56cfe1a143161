"""Values of a model's ``config.json``, of the kind that they have to be or refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aurora_sgl.errors import AuroraError

#: Above any width of a model. A damaged file that says more would ask for all memory.
MOST_WIDTH = 1 << 20


def whole(
    raw: Mapping[str, Any], name: str, default: int | None = None, *, most: int = MOST_WIDTH
) -> int:
    """A whole number from 1 to ``most``; the default where the key is null or not there.

    Raises ``KeyError`` where there is no default, ``AuroraError`` for any other value.
    """
    value = raw.get(name)
    if value is None:
        if default is None:
            raise KeyError(name)
        value = default
    if type(value) is not int or not 1 <= value <= most:
        raise wrong(name, value, f"a whole number from 1 to {most}")
    return value


def number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A number above 0; otherwise as :func:`whole`."""
    value = raw.get(name)
    if value is None:
        if default is None:
            raise KeyError(name)
        value = default
    if type(value) not in (int, float) or not 1e-12 <= value <= 1e12:
        raise wrong(name, value, "a number above 0")
    return float(value)


def mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object; an empty one where the key is null or not there."""
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong(name, value, "an object")
    return value


def shown(text: str, most: int = 80) -> str:
    """A name that a file gives, short and in one line: half a character or a line's end in it would
    break what it is printed or stored in."""
    head = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(letter if letter.isprintable() else "?" for letter in head)


def wrong(name: str, value: object, expected: str) -> AuroraError:
    """One line for a value that is of another kind."""
    try:
        words = repr(value)
    except ValueError:  # a number of more digits than Python prints
        words = "a very long number"
    return AuroraError(f"config.json: {name} is {shown(words, 40)}, it must be {expected}")
