"""Other programs that want the processor: what a server loses beside them, and how to make some."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from aurora_sgl.demo.prompts import sample_prompts
from benchmarks.recording import interval
from benchmarks.servers import arguments, ask, report, server, sglang_flags, target

NICE = 10
#: Until whoever started it is gone.
_BUSY = (
    "import os, sys\nos.nice(int(sys.argv[1]))\nparent = os.getppid()\n"
    "while os.getppid() == parent: pass"
)


@contextmanager
def busy(programs: int = 2, nice: int = NICE) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Within, so many threads of other sessions use all of the processor that they get."""
    started = [
        subprocess.Popen([sys.executable, "-c", _BUSY, str(nice)], start_new_session=True)
        for _ in range(programs)
    ]
    try:
        yield started
    finally:
        for one in started:
            one.kill()
        for one in started:
            one.wait()


@contextmanager
def noise(seed: int = 0) -> Iterator[None]:
    """Within, others take the machine now and then, for parts of a second up to some seconds."""
    draw, over = random.Random(seed), threading.Event()

    def run(programs: list[subprocess.Popen[bytes]]) -> None:
        while not over.is_set():
            some = programs[: draw.randint(0, len(programs))]
            for one in programs:
                os.kill(one.pid, signal.SIGCONT if one in some else signal.SIGSTOP)
            over.wait(draw.uniform(0.2, 3.0))

    with busy(programs=3, nice=0) as programs:
        thread = threading.Thread(target=run, args=(programs,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def main() -> int:
    """A server with as many threads as cores, alone and beside two busy threads of nice 10."""
    parser = arguments(
        "How much of its tokens/s does a server on CPU keep beside two busy threads (nice 10) of\n"
        "other sessions? Windows of one request in turn, alone and beside. Aim: 0.5.\n\n"
        "    python -m benchmarks.neighbours [--rounds 8] [--tokens 48] [--json] [--keep]"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--keep", action="store_true", help="add it to results/operation.jsonl")
    given = parser.parse_args()
    prompts = iter(sample_prompts())
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 2), "AURORA_SPECULATION": "auto"}
    started = server(
        target(given), given.drafter, flags=sglang_flags(given), environment=environment
    )
    speeds: dict[str, list[float]] = {"alone": [], "beside": []}
    with started as (process, _):

        def window() -> float:
            begun = time.perf_counter()
            ask(process.url, next(prompts), given.tokens)
            return given.tokens / (time.perf_counter() - begun)

        for _ in range(4):
            window()
        for _ in range(given.rounds):
            speeds["alone"].append(window())
            with busy():
                time.sleep(0.5)
                speeds["beside"].append(window())
    ratios = [b / a for a, b in zip(speeds["alone"], speeds["beside"], strict=True)]
    low, high = interval(ratios)
    row = {
        "threads": int(environment["OMP_NUM_THREADS"]), "alone": median(speeds["alone"]),
        "beside": median(speeds["beside"]), "ratio": median(ratios), "from": low, "to": high,
        "least": min(ratios),
    }  # fmt: skip
    title = "tokens/s beside two busy threads of nice 10 (aim: 0.5 of those alone)"
    report(title, [row], as_json=given.json, keep="neighbours" if given.keep else "")
    return 0 if row["ratio"] >= 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
