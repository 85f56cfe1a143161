"""All learning benchmarks side by side, for a machine with a GPU or with many cores.

``learning.sh`` does the same one after the other on one core, in about a day. Here every job is a
process of its own on one thread; a job waits for those whose cells it needs. A job that fails is
named at the end, and the others go on; cells that are there are not made again.

    python -m benchmarks.learning_jobs [--jobs 8] [--until 1000] [--only recipes parts ...]
        [--logs DIR] [--data DIR]

``--data`` is the larger corpus of the static drafter. Cells are kept in ``benchmarks/results`` or
in the folder ``AURORA_RESULTS``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recipes import PARTS, SEEDS
from benchmarks.traffic import NAMES

KINDS = ("recipes", "static", "objectives", "shift", "parts", "seeds")


@dataclass(frozen=True)
class Job:
    kind: str
    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()


def jobs(until: int, data: Path | None) -> list[Job]:
    """In the order of their worth."""
    found = [Job("recipes", "features", ("benchmarks.corpus.features", "--compared", "6"))]

    def add(kind: str, name: str, *command: str, after: Sequence[str] = ("features",)) -> None:
        found.append(Job(kind, name, command, tuple(after)))

    def recipes(kind: str, name: str, domain: str, seeds: Sequence[int], *more: str,
                recipe: str, after: Sequence[str] = ("features",)) -> None:  # fmt: skip
        add(
            kind, name, "benchmarks.recipes", "--domains", domain, "--until", str(until),
            "--seeds", *map(str, seeds), "--recipes", recipe, *more, after=after,
        )  # fmt: skip

    searched = ("--search", str(until))
    for domain in NAMES:
        recipes("recipes", f"ours-{domain}-0", domain, (0,), *searched, recipe="ours")
        recipes("recipes", f"aurora-{domain}-0", domain, (0,), *searched, recipe="aurora")
    add("static", "static", "benchmarks.static_drafter", *(("--data", str(data)) if data else ()))
    add("objectives", "objectives-0", "benchmarks.objectives", "--seeds", "0")
    shift = ("--trained", "400", "--each", "600")
    add("shift", "shift", "benchmarks.domain_shift", *shift)
    for number, part in enumerate(PARTS):
        add(
            "parts", f"part-{number}", "benchmarks.recipes", "--domains", "narrow", "--until",
            "400", "--seeds", "0", "--recipes", "ours", "--parts", part,
            after=("features", "ours-narrow-0"),
        )  # fmt: skip
    for domain in NAMES:
        first = (f"aurora-{domain}-0",)
        recipes("seeds", f"equal-{domain}-0", domain, (0,), *searched,
                recipe="ours equal time", after=first)  # fmt: skip
        for seed in SEEDS[1:]:
            recipes("seeds", f"ours-{domain}-{seed}", domain, (seed,), *searched, recipe="ours")
            recipes("seeds", f"aurora-{domain}-{seed}", domain, (seed,), *searched,
                    recipe="aurora", after=first)  # fmt: skip
            recipes("seeds", f"equal-{domain}-{seed}", domain, (seed,), *searched,
                    recipe="ours equal time", after=(f"aurora-{domain}-{seed}",))  # fmt: skip
    for seed in SEEDS[1:]:
        add("objectives", f"objectives-{seed}", "benchmarks.objectives", "--seeds", str(seed))
    for domain in NAMES:
        recipes("seeds", f"batch1-{domain}", domain, SEEDS, *searched, recipe="aurora batch 1")
    return found


def run_all(todo: list[Job], at_once: int, logs: Path) -> list[str]:
    """Names of the jobs that failed, with the last line of their logs."""
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    names = {job.name for job in todo}
    running: dict[str, subprocess.Popen[bytes]] = {}
    ended: dict[str, int] = {}
    began, total = time.monotonic(), len(todo)
    while todo or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                ended[name] = process.returncode
                del running[name]
                left = f"{len(ended)} of {total} in {time.monotonic() - began:.0f} s"
                print(f"{name}: {'done' if not ended[name] else 'FAILED'}, {left}", flush=True)
        for job in list(todo):
            if len(running) >= at_once:
                break
            if all(name in ended for name in job.after if name in names):
                todo.remove(job)
                with (logs / f"{job.name}.log").open("wb") as log:
                    running[job.name] = subprocess.Popen(
                        [sys.executable, "-m", *job.command],
                        stdout=log, stderr=subprocess.STDOUT, env=environment,
                    )  # fmt: skip
        time.sleep(0.2)
    return [
        f"{name}: {((logs / f'{name}.log').read_text().strip().splitlines() or ['no output'])[-1]}"
        for name, status in ended.items()
        if status
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--until", type=int, default=1000, help="served requests")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--logs", type=Path, default=Path("learning-logs"))
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    todo = [job for job in jobs(given.until, given.data) if job.kind in given.only]
    failed = run_all(todo, given.jobs, given.logs)
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
