"""Where does a step go on a CPU? One target step and one speculative step, taken apart.

A real server is asked for answers with and without drafts, ``batch`` at a time, with timers inside
its scheduler (``step_timers.py``). Times are milliseconds of the scheduler thread's own CPU time
(``--clock wall`` for the clock on the wall), the median over the steps of that batch size. *Floor*
is what the part's memory traffic and arithmetic take at the bandwidth and the rate of
multiplications that this machine shows: a step can't be shorter. The timers themselves cost about
0.3 ms a step, which fall on the parts.

    python benchmarks/cpu_step.py [--full] [--json]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from aurora_sgl.demo.prompts import sample_prompts
from benchmarks import step_timers
from benchmarks.servers import arguments, ask, report, server, target

_GRID = [("bfloat16", 1)]
_FULL = [("bfloat16", 1), ("bfloat16", 2), ("float32", 1), ("float32", 2)]
_PROMPTS = 16


def _best(work: Callable[[], object], seconds: float = 1.5) -> float:
    """The shortest of many runs, seconds."""
    shortest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - begun)
    return shortest


def machine(dtype: torch.dtype, threads: int) -> tuple[float, float]:
    """(bytes/s that a long matrix-vector product reads, operations/s of a square product)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        long = torch.ones(16384, 4096)  # 256 MiB: no cache holds it
        vector = torch.ones(4096)
        bandwidth = long.numel() * 4 / _best(lambda: torch.mv(long, vector))
        square = torch.ones(1024, 1024, dtype=dtype)
        rate = 2 * 1024**3 / _best(lambda: torch.mm(square, square))
    finally:
        torch.set_num_threads(before)
    return bandwidth, rate


@contextmanager
def timed_plugin() -> Iterator[str]:
    """A folder with which an interpreter finds the timers as an installed SGLang plugin."""
    with tempfile.TemporaryDirectory(prefix="aurora-bench-plugin-") as folder:
        info = Path(folder) / "aurora_bench_timers-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aurora-bench-timers\n")
        (info / "entry_points.txt").write_text(
            "[sglang.srt.plugins]\naurora_bench_timers = benchmarks.step_timers:register\n"
        )
        yield folder


def measure(
    model: Path, drafter: str | None, dtype: str, threads: int, sizes: list[int], given: Any
) -> list[dict[str, Any]]:
    """Rows of the table for one server."""
    bandwidth, rate = machine(getattr(torch, dtype), threads)
    root = str(Path(__file__).parents[1])
    rows: list[dict[str, Any]] = []
    with timed_plugin() as folder, tempfile.TemporaryDirectory() as scratch:
        steps = Path(scratch) / "steps.jsonl"
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join([folder, root, os.environ.get("PYTHONPATH", "")]),
            step_timers.FILE: str(steps),
            step_timers.CLOCK: given.clock,
            **dict(pair.split("=", 1) for pair in given.set),
        }
        widest = str(max(sizes))
        flags = ["--dtype", dtype, "--max-running-requests", widest]
        flags += ["--max-total-tokens", str(1024 * max(sizes)), "--disable-radix-cache"]
        print(f"starting a server: {dtype}, {threads} thread(s) ...", file=sys.stderr)
        with server(model, drafter, flags=flags, environment=environment) as (process, _):
            for size in sizes:
                for wish in ("no", "yes"):
                    steps.unlink(missing_ok=True)
                    _load(process.url, size, given.tokens, wish)
                    kind = "speculative" if wish == "yes" else "target"
                    for row in _table(steps, size, bandwidth, rate):
                        rows.append(
                            {"dtype": dtype, "threads": threads, "batch": size, "step": kind, **row}
                        )
    return rows


def _load(url: str, size: int, tokens: int, wish: str) -> None:
    prompts = sample_prompts()[:size]
    headers = {"x-aurora-speculate": wish, "x-aurora-train": "no"}
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda prompt: ask(url, prompt, tokens, **headers), prompts))


def _table(steps: Path, size: int, bandwidth: float, rate: float) -> list[dict[str, Any]]:
    """Medians by part over the decode steps of this batch size, and their floors."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    floors: dict[tuple[str, str], list[float]] = defaultdict(list)
    totals: list[float] = []
    lines = [json.loads(line) for line in steps.read_text().splitlines()]
    chosen = [line for line in lines if line["decode"] and line["batch"] == size][1:]
    for line in chosen:
        if line["counted"]:
            for phase, part, (traffic, operations) in line["parts"]:
                floors[phase, part].append(max(traffic / bandwidth, operations / rate))
            continue
        totals.append(sum(seconds for _, _, seconds in line["parts"]))
        for phase, part, seconds in line["parts"]:
            times[phase, part].append(seconds)
    if not totals:
        raise SystemExit(f"no step ran with a batch of {size}: give more --tokens")
    whole = median(totals)
    rows = [
        {
            "phase": phase,
            "part": part,
            "ms": 1000 * median(took),
            "share": median(took) / whole,
            "floor ms": 1000 * median(floors[phase, part]) if floors[phase, part] else 0.0,
        }
        for (phase, part), took in times.items()
    ]
    rows.sort(key=lambda row: (row["phase"], -row["ms"]))
    total_floor = sum(row["floor ms"] for row in rows)
    rows.append(
        {"phase": "all", "part": "", "ms": 1000 * whole, "share": 1.0, "floor ms": total_floor}
    )
    return rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--full", action="store_true", help="both dtypes, 1 and 2 threads")
    parser.add_argument("--sizes", default="1,4,16", help="batch sizes")
    parser.add_argument("--tokens", type=int, default=64, help="length of each answer")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="server's environment"
    )
    given = parser.parse_args()
    sizes = [int(size) for size in given.sizes.split(",")]
    if max(sizes) > _PROMPTS:
        parser.error(f"batches of at most {_PROMPTS}")
    rows: list[dict[str, Any]] = []
    for dtype, threads in _FULL if given.full else _GRID:
        rows += measure(target(given), given.drafter, dtype, threads, sizes, given)
    report("one step, taken apart", rows, as_json=given.json)


if __name__ == "__main__":
    main()
