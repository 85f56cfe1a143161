"""Do 1,000 swaps under load leave anything but a faster or slower drafter?

Streams ask without a pause, in float32, greedily, while two versions of a drafter go live in turn.
Every answer is held against the one that the same server gave without speculation before the first
swap; SGLang's own checksum of the target's weights is taken before and after; around each swap the
longest gap between two verify steps of a stream is set against the median step.

    python benchmarks/swaps.py [--swaps 1000] [--streams 2] [--minutes M] [--json]
"""

from __future__ import annotations

import sys
import threading
import time

import httpx

from aurora_sgl import store
from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.store import queries
from benchmarks.servers import arguments, first_live, put_live, report, server, target
from benchmarks.swap_stall import _compare, _made, _relative

PROMPTS, TOKENS = 8, 160
#: Seconds between two swaps: every stream makes a step or more, so that each swap has a step of
#: its own on either side.
PAUSE = 0.3


class Checked(threading.Thread):
    """Asks for the same few answers again and again, and compares them."""

    def __init__(self, url: str, number: int, expected: list[list[int]]) -> None:
        super().__init__(daemon=True)
        self.url, self.number, self.expected = url, number, expected
        self.answers = self.failed = self.different = 0
        self.stopping = False

    def run(self) -> None:
        at = self.number
        while not self.stopping:
            at = (at + 1) % PROMPTS
            try:
                found = ask(self.url, at)
            except httpx.HTTPError:
                self.failed += not self.stopping
                continue
            self.answers += 1
            self.different += found != self.expected[at]


def ask(url: str, prompt: int, **headers: str) -> list[int]:
    """Token ids of the greedy answer to one of the prompts."""
    body = {
        "text": sample_prompts()[prompt].prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
    }
    answer = httpx.post(f"{url}/generate", json=body, headers=headers, timeout=600)
    answer.raise_for_status()
    return list(answer.json()["output_ids"])


def target_checksum(url: str) -> str:
    """Of the target's weights in the server's memory, by SGLang's own checker."""
    body = {"action": "checksum", "selector": "target"}
    answer = httpx.post(f"{url}/weights_checker", json=body, timeout=600)
    answer.raise_for_status()
    return str(answer.json()["ranks"])


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after these; 0: never")
    given = parser.parse_args()
    flags = ("--dtype", "float32")
    with server(
        target(given), given.drafter, flags=flags, environment={"AURORA_SPECULATION": "on"}
    ) as (process, home):
        engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
        group_id, server_id, first = first_live(engine)
        versions = [first, _relative(engine, home, group_id, first)]
        before = target_checksum(process.url)
        expected = [
            ask(process.url, number, **{"x-aurora-speculate": "no"}) for number in range(PROMPTS)
        ]
        streams = [Checked(process.url, number, expected) for number in range(given.streams)]
        loaded = time.perf_counter()
        for stream in streams:
            stream.start()
        time.sleep(5)
        windows: list[tuple[float, float]] = []
        end = time.perf_counter() + 60 * given.minutes
        for number in range(given.swaps):
            wanted = versions[(number + 1) % 2]
            begun = time.perf_counter()
            put_live(engine, server_id, wanted, force=True)
            windows.append((begun, time.perf_counter()))
            if number % 50 == 49:
                counts = [(s.answers, s.failed, s.different) for s in streams]
                answers, failed, different = map(sum, zip(*counts, strict=True))
                print(
                    f"swap {number + 1}/{given.swaps}: {answers} answers, {failed} failed, "
                    f"{different} different",
                    file=sys.stderr,
                )
            time.sleep(PAUSE)
            if given.minutes and time.perf_counter() > end:
                break
        for stream in streams:
            stream.stopping = True
        for stream in streams:
            stream.join()
        after = target_checksum(process.url)
        time.sleep(3)  # the last records reach the store
        gaps, begins = _made(engine, server_id)
        # The answers without speculation, one at a time, had other steps.
        gaps = [(at, length) for at, length in gaps if at - length > loaded]
        quiet = [
            (a, b + PAUSE) for a, b in windows if not any(a - 1 <= t <= b + PAUSE for t in begins)
        ]
        with store.session(engine, write=False) as s:
            lost = sum(queries.drops.drops(s, group_id).values())
    stall = _compare(gaps, quiet)
    row = {
        "swaps": len(windows),
        "answers": sum(stream.answers for stream in streams),
        "failed": sum(stream.failed for stream in streams),
        "different": sum(stream.different for stream in streams),
        "target unchanged": before == after,
        "records lost": lost,
        "compared": len(quiet),
        "step ms": stall["step ms"],
        "p99 without": stall["p99 without"],
        "stall median": stall["median"],
        "stall p99": stall["p99"],
        "stall max": stall["max"],
    }
    title = "swaps under load (aim: 0 failed, 0 different, target unchanged, p99 <= 2 steps)"
    report(title, [row], as_json=given.json, keep="swaps" if given.keep else "")
    good = row["failed"] == row["different"] == 0 and before == after
    return 0 if good and stall["p99"] <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
