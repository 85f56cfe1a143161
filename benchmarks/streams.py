"""Do drafts pay with many requests at once? Tokens/s with and without them, by number of streams.

Two servers with the same target run at once, one with drafts in every step and one of SGLang's own
without a drafter, and are asked the same prompts in turn: under CUDA graphs every step of a server
that drafts carries drafts, so that one server can't do both.

Left to the server (``--speculation auto``), it finds out at each load what pays: in a quiet minute,
or beside programs that take the machine now and then (``--noisy``). After that come 300 quiet steps
that are not counted. Aim: 0.98 of the server without drafts, at any load.

    python benchmarks/streams.py [--streams 1,4,16,64] [--tokens 256] [--rounds 3] [--json]
"""

from __future__ import annotations

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from statistics import median
from typing import Any

from aurora_sgl.demo.prompts import Prompt, sample_prompts
from aurora_sgl.intervals import accept_length
from benchmarks.neighbours import noise
from benchmarks.servers import arguments, ask, report, server, sglang_flags, target

CALIBRATION, SETTLING = 60, 300  # steps


def without_speculation(flags: list[str]) -> list[str]:
    """The flags that are left for a server without a drafter; each has one value."""
    dropped = {at for at, flag in enumerate(flags) if flag.startswith("--speculative-")}
    return [flag for at, flag in enumerate(flags) if not {at, at - 1} & dropped]


class Both:
    """The two servers, asked in turn."""

    def __init__(self, urls: dict[bool, str], tokens: int, pool: ThreadPoolExecutor) -> None:
        self.urls, self.tokens, self.pool = urls, tokens, pool
        self.prompts = itertools.cycle(sample_prompts())

    def window(self, drafts: bool, some: list[Prompt]) -> tuple[float, list[dict[str, Any]]]:
        """(tokens/s, answers) of one prompt a stream."""
        begun = time.perf_counter()
        answers = list(self.pool.map(partial(ask, self.urls[drafts], tokens=self.tokens), some))
        return len(some) * self.tokens / (time.perf_counter() - begun), answers

    def settle(self, count: int, steps: int) -> None:
        """So many steps at least of the server that drafts."""
        while steps > 0:
            _, answers = self.window(True, list(itertools.islice(self.prompts, count)))
            steps -= max(answer["meta_info"]["spec_verify_ct"] for answer in answers)

    def compare(self, count: int, rounds: int) -> dict[str, Any]:
        speeds: dict[bool, list[float]] = {False: [], True: []}
        steps = accepted = 0
        for number in range(rounds + 1):
            some = list(itertools.islice(self.prompts, count))
            for drafts in (True, False) if number % 2 else (False, True):
                speed, answers = self.window(drafts, some)
                if number == 0:  # warms up
                    continue
                speeds[drafts].append(speed)
                for answer in answers if drafts else ():
                    steps += answer["meta_info"]["spec_verify_ct"]
                    accepted += answer["meta_info"]["spec_num_correct_drafts"]
        ratios = [b / a for a, b in zip(speeds[False], speeds[True], strict=True)]
        return {
            "streams": count,
            "tokens/s without": median(speeds[False]),
            "tokens/s with drafts": median(speeds[True]),
            "ratio": median(ratios),
            "least": min(ratios),
            "accept length": accept_length(accepted, steps),
        }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--streams", default="1,4,16,64")
    parser.add_argument("--tokens", type=int, default=256, help="of one answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speculation", choices=("on", "auto"), default="on")
    parser.add_argument("--noisy", action="store_true", help="calibrate beside other programs")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    given = parser.parse_args()
    counts = [int(count) for count in given.streams.split(",")]
    flags = ["--max-running-requests", str(max(counts)), *sglang_flags(given)]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        urls = {}
        for drafts in (False, True):
            print(f"starting the server {'with' if drafts else 'without'} drafts", file=sys.stderr)
            started = server(
                target(given),
                given.drafter,
                flags=flags if drafts else without_speculation(flags),
                environment={"AURORA_SPECULATION": given.speculation},
                drafts=drafts,
            )
            urls[drafts] = stack.enter_context(started)[0].url
        pool = stack.enter_context(ThreadPoolExecutor(max(counts)))
        both = Both(urls, given.tokens, pool)
        for count in counts:
            if given.speculation == "auto":
                with noise() if given.noisy else nullcontext():
                    both.settle(count, CALIBRATION)
                both.settle(count, SETTLING)
            row = both.compare(count, given.rounds)
            row["calibrated"] = "noisy" if given.noisy else "quiet"
            rows.append(row)
            print(row, file=sys.stderr)
    keep = f"streams {given.speculation}" if given.keep else ""
    report("tokens/s with drafts and without", rows, as_json=given.json, keep=keep)


if __name__ == "__main__":
    main()
