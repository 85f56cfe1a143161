"""How often does the watch take back what is no worse, and how soon what is damaged?

Requests are simulated as in ``gate.py``. The version before served a few of them; then windows of
the promoted version go through the watch's own ``judge``, with its settings, until one is worse
beyond doubt, or ``failures`` are bad, or ``windows`` have passed. Tokens per second play no part.
Some requests are sampled, which takes ``SAMPLING`` off their acceptance rate: ``MIXES`` are their
shares before the promotion and after it.

    python benchmarks/watch.py [--watches 1000] [--baselines 6 12 20 100] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from itertools import count, product

import numpy as np

from aurora_sgl.config import WatchSettings
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.rollout.live_traffic import strata
from aurora_sgl.rollout.watch import filled, judge
from aurora_sgl.store.queries.request_counts import RequestCounts
from benchmarks.gate import DEPTH, draw, replay
from benchmarks.servers import report

#: What is added to the acceptance rates of the promoted version. The rates are kept above 0.01,
#: so a damaged version accepts one proposal in a hundred.
KINDS = {"equal": 0.0, "5% better": 0.02, "a third of the drafts lost": -0.12, "damaged": -1.0}
#: What sampling takes off the acceptance rates: an accept length of 1.98 becomes 1.68, as at
#: temperature 0.7 in the demo.
SAMPLING = -0.12
MIXES = ((0.0, 0.0), (0.0, 0.5), (0.1, 0.9), (0.5, 1.0), (0.9, 0.1))
#: Largest share of equal or better versions that may be taken back.
FALSE = 0.05
#: Requests before the promotion from which one window has to be enough for a damaged version. With
#: fewer, over three domains, most of what is served has nothing to be compared with.
ENOUGH = 12
WHEN = datetime(2026, 1, 1, tzinfo=UTC)


def served(
    rng: np.random.Generator, requests: int, gain: float, first_id: int = 0, sampled: float = 0.0
) -> list[RequestCounts]:
    """Each request has an id of its own, from ``first_id`` on: windows count requests by it.
    ``sampled``: the share of those that are."""
    drawn = int(rng.binomial(requests, sampled))
    parts = (("greedy", requests - drawn, gain), ("target_sampling", drawn, gain + SAMPLING))
    both = [(rule, one) for rule, n, rise in parts for one in replay(rng, draw(rng, n), rise) if n]
    return [
        RequestCounts(id, r.domain, DEPTH, 1, DEPTH + 1, r.verify_steps, r.accepted, WHEN, rule)
        for id, (rule, r) in enumerate(both, first_id)
    ]


def window(
    rng: np.random.Generator,
    before: dict[str, AcceptCounts],
    rules: WatchSettings,
    gain: float,
    sampled: float = 0.0,
    first_id: int = 0,
) -> list[RequestCounts]:
    """Requests until the window is full, as the watch cuts it."""
    found: list[RequestCounts] = []
    while not filled(found, before, rules):
        found += served(rng, 1, gain, first_id + len(found), sampled)
    return found


def watch(
    rng: np.random.Generator,
    rules: WatchSettings,
    baseline: int,
    gain: float,
    mix: tuple[float, float] = (0.0, 0.0),
) -> int:
    """The window after which the version was taken back, from 1; 0: it stayed. ``mix``: the shares
    of sampled requests before the promotion and after it."""
    before = strata(served(rng, baseline, 0.0, sampled=mix[0]))
    wrong = 0
    earlier: list[RequestCounts] = []
    for number in count(1):
        here = window(rng, before, rules, gain, mix[1], len(earlier))
        verdict = judge(here, before, rules, earlier)[0].verdict
        earlier += here
        wrong += verdict == "bad"
        if verdict == "fail" or wrong >= rules.failures:
            return number
        if number >= rules.windows:
            return 0
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    parser.add_argument("--watches", type=int, default=1000)
    parser.add_argument("--baselines", type=int, nargs="*", default=[6, 12, 20, 100])
    parser.add_argument("--small", action="store_true", help="a few of each: does it run?")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.small:
        given.watches, given.baselines = 3, [6, 20]
    rules = WatchSettings()
    rows = []
    for kind, gain in KINDS.items():
        for baseline, mix in product(given.baselines, MIXES):
            seeds = [given.seed, baseline, abs(int(100 * gain))]
            rng = np.random.default_rng([*seeds, *(round(100 * share) for share in mix if share)])
            ends = [watch(rng, rules, baseline, gain, mix) for _ in range(given.watches)]
            back = sum(end > 0 for end in ends) / given.watches
            first = sum(end == 1 for end in ends) / given.watches
            aim, met = "", True
            if gain >= 0:
                aim, met = f"taken back <= {FALSE:.0%}", back <= FALSE
            elif kind == "damaged" and baseline >= ENOUGH and mix == (0.0, 0.0):
                aim, met = "within one window >= 99%", first >= 0.99
            rows.append(
                {"version": kind, "requests before": baseline, "sampled before": mix[0],
                 "sampled after": mix[1], "watches": given.watches,
                 "taken back": back, "within one window": first, "aim": aim, "met": met}
            )  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr)
    report(
        "what the watch takes back", rows, as_json=given.json, keep="watch" if given.keep else ""
    )
    return 0 if given.small or all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
