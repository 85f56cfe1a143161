"""The series that docs/metrics.md names, and what PromQL asks for."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

METRICS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(aurora_\w+)` \| (\w+) \| ([^|]*) \|", re.MULTILINE)
#: A name of a series of ours or SGLang's in an expression; recorded ones have a colon before it.
_NAME = re.compile(r"(?<![\w:])(aurora_\w+|sglang:\w+)\s*(\{[^}]*\})?")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


class Documented(NamedTuple):
    kind: str
    labels: frozenset[str]


@cache
def documented() -> dict[str, Documented]:
    """By the name under which Prometheus has it; of a histogram the name without ``_bucket``."""
    return {
        name: Documented(kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in _ROW.findall(METRICS.read_text())
    }


def asked_for(expression: str) -> list[tuple[str, set[str]]]:
    """Series that an expression names, each with the labels by which it chooses them."""
    return [
        (name, set(_MATCHER.findall(matchers or "")))
        for name, matchers in _NAME.findall(expression)
    ]


def is_documented(name: str, labels: set[str]) -> bool:
    """Whether a series of ours has this name and these labels, those of its target aside."""
    base = name if name in documented() else re.sub(r"_(bucket|sum|count)$", "", name)
    known = documented().get(base)
    if known is None or (base != name and known.kind != "histogram"):
        return False
    return labels <= known.labels | {"group", "server", "instance", "job", "le"}
