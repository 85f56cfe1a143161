"""What do recording and trace capture cost? Aims: at least 0.99 and 0.97 of the tokens/s without.

Three servers run at once and are asked the same prompts in turn, one server at a time (one that
waits sleeps), so that the machine's moods fall on all three alike. A round gives one ratio; the
table shows the median over rounds and its 95% bootstrap interval.

    python benchmarks/recording.py [--rounds 60] [--tokens 48] [--streams 1] [--json]
"""

from __future__ import annotations

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from statistics import median

import numpy as np

from aurora_sgl.demo.prompts import sample_prompts
from benchmarks.servers import arguments, ask, report, server, sglang_flags, target

ARMS = {
    "off": {"AURORA_RECORD": "0"},
    "recording": {"AURORA_RECORD": "1", "AURORA_CAPTURE_SHARE": "0"},
    "recording and capture": {"AURORA_RECORD": "1", "AURORA_CAPTURE_SHARE": "1"},
}


def interval(ratios: list[float]) -> tuple[float, float]:
    """95% percentile bootstrap interval of the median."""
    picks = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    low, high = np.percentile(np.median(picks, axis=1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--streams", type=int, default=1, help="requests at once")
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    with ExitStack() as stack:
        urls = {}
        for name, environment in ARMS.items():
            print(f"starting the server with recording {name} ...", file=sys.stderr)
            environment = {"AURORA_SPECULATION": "on", **environment}
            flags = sglang_flags(given)
            started = server(target(given), given.drafter, flags=flags, environment=environment)
            urls[name] = stack.enter_context(started)[0].url
        orders = list(itertools.permutations(ARMS))
        pool = stack.enter_context(ThreadPoolExecutor(given.streams))
        prompts = itertools.cycle(sample_prompts())
        for number in range(given.rounds + 2):
            some = list(itertools.islice(prompts, given.streams))
            for name in orders[number % len(orders)]:
                begun = time.perf_counter()
                list(pool.map(partial(ask, urls[name], tokens=given.tokens), some))
                if number >= 2:  # the first two rounds warm up
                    seconds[name].append(time.perf_counter() - begun)
            if number % 10 == 0:
                print(f"round {number}/{given.rounds}", file=sys.stderr)
    rows = []
    for name, took in seconds.items():
        ratios = [off / on for off, on in zip(seconds["off"], took, strict=True)]
        low, high = interval(ratios)
        rows.append(
            {
                "arm": name,
                "tokens/s (median)": given.streams * given.tokens / median(took),
                "ratio to off (median)": median(ratios),
                "95% from": low,
                "95% to": high,
                "aim": {"off": "", "recording": ">= 0.99"}.get(name, ">= 0.97"),
            }
        )
    title = f"recording: {given.rounds} rounds of {given.streams} x {given.tokens} tokens"
    report(title, rows, as_json=given.json)


if __name__ == "__main__":
    main()
