"""Does a tree that grows as far as it pays beat every fixed one? Tokens/s by shape, in turns.

One server for each fixed shape, which drafts so in every step, one that chooses each step's tree
within the largest of them, and one without drafts, all with the same target and drafter. They are
asked the same prompts in short turns, each round in another order, so that whatever else the
machine does falls on all alike; the policy has settled before. The ratio is of
the tokens per second of one round and kind of traffic; interval: of the mean of its logarithm over
rounds (95%, t). Aim: 1.03 of the best fixed shape, and never below 0.98.

    python -m benchmarks.shapes [--streams 1,4] [--rounds 12] [--shapes 1/1/2,3/4/8] [--json]
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import t as student

from aurora_sgl.demo.prompts import DEFAULT_MAX_TOKENS, Prompt
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.intervals import accept_length
from benchmarks.corpus.features import corpus, target_folder
from benchmarks.servers import arguments, ask, report, server, sglang_flags, target

GROWS, PLAIN = "grows", "none"
DRAFTER = Path(__file__).parent / "static-drafter"
KINDS = ("chat", "narrow")


def prompts(kind: str, count: int) -> list[Prompt]:
    """Of the corpus: held out, as the static drafter was not trained on their answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target_folder())
    rows = [place.answered for place in corpus(kind).rows[:count]]
    texts = [tokenizer.decode(one.tokens[: one.prompt_tokens].tolist()) for one in rows]
    return [Prompt(kind, text, DEFAULT_MAX_TOKENS) for text in texts]


class Arms:
    """The servers, asked in turn."""

    def __init__(self, urls: dict[str, str], tokens: int, pool: ThreadPoolExecutor) -> None:
        self.urls, self.tokens, self.pool = urls, tokens, pool

    def turn(self, arm: str, some: Sequence[Prompt]) -> tuple[float, int, int]:
        """(tokens/s, accepted drafts, verify steps) of one prompt a stream."""
        begun = time.perf_counter()
        # Whatever pays at this load: a server without drafts is an arm of its own.
        one = partial(ask, self.urls[arm], tokens=self.tokens, **{"x-aurora-speculate": "yes"})
        answers = [answer["meta_info"] for answer in self.pool.map(one, some)]
        speed = len(some) * self.tokens / (time.perf_counter() - begun)
        accepted = sum(answer.get("spec_num_correct_drafts", 0) for answer in answers)
        return speed, accepted, sum(answer.get("spec_verify_ct", 0) for answer in answers)

    def settle(self, streams: int, steps: int, source: itertools.cycle[Prompt]) -> None:
        """So many steps at least of the server that chooses; a few of the others."""
        for arm in self.urls:
            self.turn(arm, list(itertools.islice(source, streams)))
        while steps > 0:
            _, _, made = self.turn(GROWS, list(itertools.islice(source, streams)))
            steps -= made // streams


def ratio(speeds: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of a over b by pairs, on the logarithm's scale."""
    logs = np.log(np.asarray(speeds)) - np.log(np.asarray(others))
    half = student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    mean = float(logs.mean())
    return tuple(float(np.exp(x)) for x in (mean, mean - half, mean + half))  # type: ignore[return-value]


def compare(arms: Arms, streams: int, rounds: int, source: list[Prompt]) -> list[dict[str, Any]]:
    """A row an arm, at one number of streams and for one kind of traffic."""
    speeds: dict[str, list[float]] = {arm: [] for arm in arms.urls}
    sums = {arm: [0, 0] for arm in arms.urls}
    order, asked = random.Random(0), itertools.cycle(source)
    for _ in range(rounds):
        some = list(itertools.islice(asked, streams))
        for arm in order.sample(list(arms.urls), len(arms.urls)):
            speed, accepted, steps = arms.turn(arm, some)
            speeds[arm].append(speed)
            sums[arm][0] += accepted
            sums[arm][1] += steps
    rows = []
    for arm, own in speeds.items():
        low = high = mean = 1.0
        if arm != GROWS:
            mean, low, high = ratio(speeds[GROWS], own)
        rows.append(
            {
                "streams": streams,
                "shape": arm,
                "tokens/s": median(own),
                "accept length": accept_length(*sums[arm]) if sums[arm][1] else 1.0,
                "grows over it": mean,
                "low": low,
                "high": high,
            }
        )
    return rows


def flags_of(shape: str) -> list[str]:
    depth, topk, nodes = map(int, shape.split("/"))
    return [word for pair in DraftShape(depth, topk, nodes).flags.items() for word in pair]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--streams", default="1,4")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--shapes", default="1/1/2,1/4/4,2/4/4,3/4/8")
    parser.add_argument("--tokens", type=int, default=96, help="of one answer")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--settle", type=int, default=600, help="steps before, at each load")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    given = parser.parse_args()
    counts = [int(count) for count in given.streams.split(",")]
    shapes = given.shapes.split(",")
    largest = max(shapes, key=lambda shape: int(shape.split("/")[2]))
    more = ["--max-running-requests", str(max(8, *counts)), *sglang_flags(given)]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        urls = {}
        for arm in (GROWS, PLAIN, *shapes):
            print(f"starting {arm}", file=sys.stderr, flush=True)
            shape = largest if arm in (GROWS, PLAIN) else arm
            environment = (
                {"AURORA_SPECULATION": "auto", "AURORA_SHAPES": "learned"}
                if arm == GROWS
                else {"AURORA_SPECULATION": "on"}
            )
            started = server(
                target(given),
                given.drafter or str(DRAFTER),
                flags=[*more, *(flags_of(shape) if arm != PLAIN else [])],
                environment=environment,
                drafts=arm != PLAIN,
            )
            urls[arm] = stack.enter_context(started)[0].url
        pool = stack.enter_context(ThreadPoolExecutor(max(counts)))
        arms = Arms(urls, given.tokens, pool)
        for kind in given.kinds.split(","):
            source = prompts(kind, 60)
            for count in counts:
                arms.settle(count, given.settle, itertools.cycle(source[30:]))
                for row in compare(arms, count, given.rounds, source[:30]):
                    rows.append({"traffic": kind, **row})
                    print(rows[-1], file=sys.stderr, flush=True)
    keep = "shapes" if given.keep else ""
    report("tokens/s by draft shape, CPU", rows, as_json=given.json, keep=keep)


if __name__ == "__main__":
    main()
