"""Do drafts pay with many requests at once? Tokens/s with and without them, by number of streams.

Two servers with the same target run at once, one with drafts in every step and one of SGLang's own
without a drafter, and are asked the same prompts in turn: under CUDA graphs every step of a server
that drafts carries drafts, so that one server can't do both.

    python benchmarks/streams.py [--streams 1,4,16,64] [--tokens 256] [--rounds 3] [--json]
"""

from __future__ import annotations

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.intervals import accept_length
from benchmarks.servers import arguments, ask, report, server, sglang_flags, target


def without_speculation(flags: list[str]) -> list[str]:
    """The flags that are left for a server without a drafter; each has one value."""
    dropped = {at for at, flag in enumerate(flags) if flag.startswith("--speculative-")}
    return [flag for at, flag in enumerate(flags) if not {at, at - 1} & dropped]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--streams", default="1,4,16,64")
    parser.add_argument("--tokens", type=int, default=256, help="of one answer")
    parser.add_argument("--rounds", type=int, default=3)
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
                environment={"AURORA_SPECULATION": "on"},
                drafts=drafts,
            )
            urls[drafts] = stack.enter_context(started)[0].url
        pool = stack.enter_context(ThreadPoolExecutor(max(counts)))
        for count in counts:
            speeds: dict[bool, list[float]] = {False: [], True: []}
            steps = accepted = 0
            prompts = itertools.cycle(sample_prompts())
            for number in range(given.rounds + 1):
                some = list(itertools.islice(prompts, count))
                for drafts in (True, False) if number % 2 else (False, True):
                    begun = time.perf_counter()
                    answers = list(pool.map(partial(ask, urls[drafts], tokens=given.tokens), some))
                    if number == 0:  # warms up
                        continue
                    speeds[drafts].append(count * given.tokens / (time.perf_counter() - begun))
                    for answer in answers if drafts else ():
                        steps += answer["meta_info"]["spec_verify_ct"]
                        accepted += answer["meta_info"]["spec_num_correct_drafts"]
            without, with_drafts = median(speeds[False]), median(speeds[True])
            rows.append(
                {
                    "streams": count,
                    "tokens/s without": without,
                    "tokens/s with drafts": with_drafts,
                    "ratio": with_drafts / without,
                    "accept length": accept_length(accepted, steps),
                }
            )
    report("tokens/s with drafts and without", rows, as_json=given.json)


if __name__ == "__main__":
    main()
