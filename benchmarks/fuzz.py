"""What do thousands of odd inputs do to the readers of this project?

Requests (headers and bodies), settings, prompts files, statements of the SQL page, drafter folders,
weights to swap in, pickles, spools and traces, each changed at random from a sound one. Every kind
runs in a process of its own, so that a crash or a hang is one finding and the rest goes on. Aim:
0 crashes, 0 tracebacks, 0 hangs over 10 s, and the target's weights as they were.

    python -m benchmarks.fuzz [--count 10000] [--seed 0] [--kind NAME] [--only N] [--postgres URL]
        [--json]

An input is made of kind, seed and number alone: ``--kind traces --seed 0 --only 17`` is the same
one again. Exits with 1 when there is a finding.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from aurora_sgl.console import print_json, print_table
from benchmarks.fuzz_mutations import TAKEN
from benchmarks.ingest import postgres

#: In the order of the table, with the class of each, which its own process imports.
KINDS = {
    "requests": "benchmarks.fuzz_targets:Requests",
    "settings": "benchmarks.fuzz_targets:SettingsOfAll",
    "prompts": "benchmarks.fuzz_targets:PromptFiles",
    "sql": "benchmarks.fuzz_targets:Statements",
    "sql-postgresql": "benchmarks.fuzz_targets:PostgresStatements",
    "checkpoints": "benchmarks.fuzz_files:OddDrafters",
    "swaps": "benchmarks.fuzz_files:OddWeights",
    "pickles": "benchmarks.fuzz_files:OddPickles",
    "spool": "benchmarks.fuzz_files:OddSpools",
    "traces": "benchmarks.fuzz_files:OddTraces",
}
#: Answers whether an input was taken or refused; raises whatever is a finding.
Kind = Callable[[random.Random], str]
HANG_SECONDS = 10.0
#: Seconds that a process has to import what it needs and to make its sound inputs.
START_SECONDS = 300.0
#: Findings of a kind after which it is left.
MOST_FINDINGS = 50


@dataclass
class Row:
    """One line of the table."""

    kind: str
    inputs: int = 0
    taken: int = 0
    refused: int = 0
    crashes: int = 0
    tracebacks: int = 0
    hangs: int = 0
    slowest_ms: float = 0.0
    findings: list[str] = field(default_factory=list)

    def count(self, what: str, number: int, why: str) -> None:
        """A finding: "crashes", "tracebacks" or "hangs"."""
        setattr(self, what, getattr(self, what) + 1)
        self.findings.append(f"{self.kind} {number}: {why}")


def generator(kind: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{kind}/{seed}/{number}")


def made(place: str, folder: Path) -> Kind:
    """The kind at ``module:class``, with its sound inputs."""
    module, _, name = place.partition(":")
    kind: Kind = getattr(importlib.import_module(module), name)(folder)
    return kind


def attempt(kind: Kind, rng: random.Random) -> tuple[str, str, float]:
    """What came of one input ("taken", "refused" or "tracebacks"), why, and seconds."""
    begun = time.monotonic()
    try:
        what, why = kind(rng), ""
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = " ".join(str(error).split())[:200].encode("utf-8", "backslashreplace").decode()
        what = "tracebacks"
        why = f"{type(error).__name__}: {line} ({Path(place.filename).name}:{place.lineno})"
    return what, why, time.monotonic() - begun


def _child(pipe: Connection, place: str, name: str, folder: str, seed: int, numbers: range) -> None:
    """In a process of its own: every input, and a word before and after it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    kind = made(place, Path(folder))
    pipe.send("ready")
    for number in numbers:
        pipe.send(attempt(kind, generator(name, seed, number)))
    pipe.close()


def fuzz(place: str, name: str, numbers: range, seed: int, *, seconds: float = HANG_SECONDS) -> Row:
    """Every input of a kind; what ends or holds up its process is counted and passed over."""
    row = Row(name)
    while numbers and len(row.findings) < MOST_FINDINGS:
        with tempfile.TemporaryDirectory(prefix="aurora-fuzz-") as folder:
            numbers = _round(row, place, numbers, seed, folder, seconds)
    return row


def _round(row: Row, place: str, numbers: range, seed: int, folder: str, seconds: float) -> range:
    """One process; returns the inputs that are left when it has ended."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, place, row.kind, folder, seed, numbers))
    process.start()
    theirs.close()
    number = numbers.start
    try:
        if not ours.poll(START_SECONDS) or ours.recv() != "ready":
            row.count("hangs", number, f"not ready after {START_SECONDS:.0f} s")
            return range(0)
        while number < numbers.stop:
            if not ours.poll(seconds):
                row.inputs += 1
                row.count("hangs", number, f"no answer within {seconds:.0f} s")
                break
            _note(row, number, *ours.recv())
            number += 1
            if len(row.findings) >= MOST_FINDINGS:
                return range(0)
        else:
            return range(0)
    except EOFError:
        process.join(10)
        row.inputs += 1
        row.count("crashes", number, f"its process ended ({process.exitcode})")
        if row.inputs == 1 and number == numbers.start and process.exitcode == 1:
            return range(0)  # it could not even be made
    finally:
        process.kill()
        process.join()
        ours.close()
    return range(number + 1, numbers.stop)


def _note(row: Row, number: int, what: str, why: str, seconds: float) -> None:
    row.inputs += 1
    row.slowest_ms = max(row.slowest_ms, round(1000 * seconds, 1))
    if what == "tracebacks":
        row.count(what, number, why)
    elif what == TAKEN:
        row.taken += 1
    else:
        row.refused += 1


def run(
    count: int,
    seed: int,
    names: Mapping[str, str],
    *,
    only: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """``count`` inputs, spread over the kinds; or input ``only`` of each."""
    rows = []
    for index, (name, place) in enumerate(names.items()):
        share = count // len(names) + (index < count % len(names))
        numbers = range(share) if only is None else range(only, only + 1)
        say(f"{name}: {len(numbers)} inputs ...")
        rows.append(fuzz(place, name, numbers, seed))
        for line in rows[-1].findings:
            say(f"  {line}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=10_000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="one kind (may be repeated)")
    parser.add_argument("--only", type=int, help="one input of each kind, by its number")
    parser.add_argument("--postgres", help="URL of a cluster whose role may make databases")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    names = {name: KINDS[name] for name in given.kind or KINDS}
    print(f"seed {given.seed}", file=sys.stderr)
    with ExitStack() as stack:
        if "sql-postgresql" in names:
            url = stack.enter_context(postgres(given.postgres))
            if url is None:
                parser.error("sql-postgresql needs --postgres URL, or the package pgserver")
            os.environ["FUZZ_POSTGRES"] = url
        rows = run(given.count, given.seed, names, only=given.only,
                   say=lambda line: print(line, file=sys.stderr, flush=True))  # fmt: skip
    show(rows, as_json=given.json)
    return 1 if any(row.findings for row in rows) else 0


def show(rows: list[Row], *, as_json: bool) -> None:
    whole = Row("all")
    for row in rows:
        for name in ("inputs", "taken", "refused", "crashes", "tracebacks", "hangs"):
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
        whole.slowest_ms = max(whole.slowest_ms, row.slowest_ms)
    cells: list[dict[str, Any]] = [vars(row) for row in (*rows, whole)]
    if as_json:
        print_json(cells)
        return
    names = ("kind", "inputs", "taken", "refused", "crashes", "hangs")
    columns = {name: name for name in names} | {"errors": "tracebacks", "ms": "slowest_ms"}
    print_table("Odd inputs; errors: tracebacks; ms: the slowest", columns, cells)


if __name__ == "__main__":
    sys.exit(main())
