"""Benchmarks run: those that need neither a server nor minutes of training, at the smallest size
that means anything. Those of learning show their committed cells. What they measure is nobody's
business here; that they end, and print a row, is. The others at least load and know their
arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_line import CommandLine, command_line

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180
COMMANDS = [
    "conversations --chats 12 --json",
    "gate --small --json",
    "watch --small --json",
    "ingest --events 2000 --batches 100 --json",
    "views --events 3000 --days 2 --versions 3 --json",
    "dashboard_data {folder}/dashboard --events 2000 --versions 3 --days 2",
    "swap_work --sizes small --swaps 2 --json",
    "trace_room --hidden 256 --tokens 64 --gib 0.002",
    "wide {folder}/wide --hidden 512 --layers 4 --bytes 2e7",
    "objectives --show",
    "recipes --show",
    "domain_shift --trained 400 --each 600 --show --cells benchmarks/results/h200",
    "fuzz --count 40 --kind settings",
]


@pytest.fixture(scope="module")
def running() -> Iterator[CommandLine]:
    """One process imports what is slow to import, and forks for each of them."""
    with command_line() as one:
        yield one


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_a_benchmark_ends_and_prints_what_it_measured(
    command: str, running: CommandLine, tmp_path: Path, model: Path, base_home: Path
) -> None:
    name, *arguments = command.format(folder=tmp_path).split()
    environment = {"OMP_NUM_THREADS": "1", "AURORA_HOME": str(base_home)}
    if "--show" not in arguments:  # what is measured here is no result of the project
        environment["AURORA_RESULTS"] = str(tmp_path / "results")
    done = running.run(
        arguments, environment, folder=ROOT, seconds=SECONDS, module=f"benchmarks.{name}"
    )
    words = done.err.strip().splitlines()
    assert "Traceback" not in done.err, words[-1]
    assert done.code in (0, 1) and done.out.strip(), words[-3:]
    if "--json" in arguments:
        assert json.loads(done.out)


ELSEWHERE = {"llama_cpp_server"}  # runs in an environment that lacks this project
_START = """
import contextlib, importlib, io, sys
for name in sys.argv[1].split(","):
    module, text = importlib.import_module(f"benchmarks.{name}"), io.StringIO()
    sys.argv[1:] = ["--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        module.main()
    assert "usage:" in text.getvalue(), name
print("all")
"""


def test_every_benchmark_starts() -> None:
    names = [
        ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
        for path in sorted((ROOT / "benchmarks").rglob("*.py"))
        if "def main(" in path.read_text() and path.stem not in ELSEWHERE
    ]
    assert len(names) > 30
    done = subprocess.run(
        [sys.executable, "-c", _START, ",".join(names)],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "all", done.stderr[-600:]
