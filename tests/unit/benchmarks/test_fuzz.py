"""``benchmarks.fuzz``: some hundred odd inputs of every kind, and that a finding is one."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from benchmarks import fuzz

HERE = "tests.unit.benchmarks.test_fuzz"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.process if "postgresql" in name else ())
        for name in fuzz.KINDS
    ],
)
def test_no_odd_input_crashes_hangs_or_ends_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, name: str
) -> None:
    if "postgresql" in name:
        monkeypatch.setenv("FUZZ_POSTGRES", request.getfixturevalue("postgres_url"))
    monkeypatch.setenv("AURORA_STAMP", "a-stamp-of-this-test")
    kind = fuzz.made(fuzz.KINDS[name], tmp_path)
    answers = set()
    for number in range(15 if "postgresql" in name else 50):  # a connection for each statement
        what, why, seconds = fuzz.attempt(kind, fuzz.generator(name, 0, number))
        assert what in ("taken", "refused"), f"{name} {number}: {why}"
        assert seconds < fuzz.HANG_SECONDS
        answers.add(what)
    assert "taken" in answers, "inputs that are never taken say little"
    assert name == "spool" or "refused" in answers, "nor do those that always are"


class Planted:
    """Three findings among seven inputs, the process's end and its standing still among them."""

    def __init__(self, folder: Path) -> None:
        assert not list(folder.iterdir())

    def __call__(self, rng: random.Random) -> str:
        lot = rng.random()
        if lot < 0.25:
            os._exit(3)
        if lot < 0.5:
            raise KeyError("factor")
        if lot < 0.65:
            time.sleep(60)
        return "taken" if lot < 0.8 else "refused"


def expected(seed: int, numbers: range) -> dict[str, int]:
    counts = dict.fromkeys(("crashes", "tracebacks", "hangs", "taken", "refused"), 0)
    for number in numbers:
        lot = fuzz.generator("planted", seed, number).random()
        edges = {0.25: "crashes", 0.5: "tracebacks", 0.65: "hangs", 0.8: "taken", 2: "refused"}
        counts[next(what for edge, what in edges.items() if lot < edge)] += 1
    return counts


@pytest.mark.process
def test_crashes_tracebacks_and_hangs_are_counted_and_the_rest_goes_on() -> None:
    numbers = next(
        range(first, first + 6)
        for first in range(100)
        if all(0 < n < 3 for n in expected(1, range(first, first + 6)).values())
    )
    row = fuzz.fuzz(f"{HERE}:Planted", "planted", numbers, 1, seconds=1.0)
    assert {name: getattr(row, name) for name in expected(1, numbers)} == expected(1, numbers)
    assert row.inputs == len(numbers)
    assert len(row.findings) == row.crashes + row.tracebacks + row.hangs
    assert any("KeyError: 'factor' (test_fuzz.py:" in line for line in row.findings)


@pytest.mark.process
def test_a_finding_ends_the_command_with_1_and_its_number_makes_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "KINDS", {"planted": f"{HERE}:Planted"})
    crash = next(n for n in range(99) if expected(4, range(n, n + 1))["crashes"])
    fine = next(n for n in range(99) if expected(4, range(n, n + 1))["taken"])
    codes = []
    for number in (crash, fine):
        argv = ["fuzz", "--seed", "4", "--only", str(number)]
        monkeypatch.setattr("sys.argv", argv)
        codes.append(fuzz.main())
    printed = capsys.readouterr()
    assert codes == [1, 0] and "seed 4" in printed.err and "Odd inputs" in printed.out
    assert f"planted {crash}: its process ended (3)" in printed.err
