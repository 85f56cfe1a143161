"""An idea is written once: what an accept length is, how two are set against each other, how long a
function may be."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tools.import_graph import ROOT, files

LONGEST = 80  # lines of a function
#: 1 + accepted / steps, however its two parts are called.
SPELLING = re.compile(
    r"\b1(?:\.0)? \+ [^\n#]*accepted[^\n#]*/[^\n#]*(?:steps|seen|count)", re.IGNORECASE
)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def code_of(text: str) -> str:
    """Without comments and texts, in which a formula may stand."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_an_accept_length_is_computed_in_one_place() -> None:
    texts = {path: path.read_text() for path in files()}
    places = {
        str(path.relative_to(ROOT))
        for path, text in texts.items()
        if SPELLING.search(text) and SPELLING.search(code_of(text))
    }
    # One expression in SQL, which no function of Python's can be.
    assert places <= {"aurora_sgl/intervals.py", "aurora_sgl/store/queries/explorer.py"}


@pytest.mark.parametrize(
    "line",
    ["x = 1 + r.accepted / r.verify_steps", "y = 1.0 + sum(a.accepted for a in b) / steps"],
)
def test_another_spelling_is_seen(line: str) -> None:
    assert SPELLING.search(code_of(line))


def test_one_function_sets_two_drafters_against_each_other_on_the_same_requests() -> None:
    named = [
        str(path.relative_to(ROOT))
        for path in files()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and node.name == "paired_difference"
    ]
    assert named == ["aurora_sgl/intervals.py"]


def test_no_function_is_longer_than_a_screen_or_two() -> None:
    long = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in files()
        if "versions" not in path.parts  # a migration is a list
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST
    }
    assert long == set()


def test_a_class_name_has_one_meaning() -> None:
    places: dict[str, set[str]] = {}
    for path in files():
        if path.parts[len(ROOT.parts)] in ("aurora_sgl", "dashboard"):
            for node in parsed(path).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, set()).add(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


#: Names of the public contract: columns, and fields of files and of what ``doctor --json`` prints.
CONTRACT = {
    ("aurora_sgl/doctor.py", "found"),
    ("aurora_sgl/sidecar/refused.py", "at"),
    ("aurora_sgl/store/models/serving.py", "at"),
    ("aurora_sgl/store/queries/steps.py", "at"),
}
NO_NOUNS = {"found", "said", "at", "told", "known", "seen", "made"}


def test_what_a_name_stands_for_has_a_noun() -> None:
    names = {
        (str(path.relative_to(ROOT)), name)
        for path in files()
        if path.parts[len(ROOT.parts)] in ("aurora_sgl", "dashboard")
        for node in ast.walk(parsed(path))
        if (name := bound_name(node)) in NO_NOUNS
    }
    assert names == CONTRACT


def bound_name(node: ast.AST) -> str:
    """The variable or parameter that a node binds; "" for what binds none."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return node.arg if isinstance(node, ast.arg) else ""
