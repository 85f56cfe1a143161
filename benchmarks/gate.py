"""How often does the gate pass what is no better, and how soon does it find what is?

Requests are simulated as they are served: a request has a log-normal number of output tokens and
its own acceptance rate, drawn from a beta distribution (requests differ by far more than chance
within one), and both versions answer the same one, so a request that is easy for one is easy for
the other. A step accepts a chain of up to ``DEPTH`` proposals. Both versions then go through the
gate itself, ``evaluation.gate.judge``, with its settings.

Equal versions: for each live version a candidate is tried up to ``--tries`` times, on fresh
requests each time, and all tries spend from one allowance, as in the store. An exact binomial test
asks whether more than alpha of the live versions were beaten by one that is no better.

A better version: its acceptance rate is raised until its accept length is 5% longer; how often is
it found with at most 300 requests?

    python benchmarks/gate.py [--comparisons 1000] [--tries 3] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest

from aurora_sgl.config import GateSettings
from aurora_sgl.evaluation.gate import PASS, judge
from aurora_sgl.evaluation.replay import RequestReplay
from aurora_sgl.intervals import AcceptCounts
from benchmarks.servers import report

DEPTH = 4
DOMAINS = ("chat", "code", "extraction")
#: Mean acceptance rate of a proposal by domain; accept lengths of 1.6 to 2.4, as in the demo.
RATES = {"chat": 0.40, "code": 0.50, "extraction": 0.62}
#: Beta concentration of a request's rate around its domain's: a standard deviation of about 0.13,
#: which is what the demo's served requests had.
CONCENTRATION = 12.0
#: Median and spread of output tokens.
MEDIAN_TOKENS, SPREAD = 60.0, 0.6
#: The two versions agree on most requests but not on all: deviation of a version's own rate.
OWN = 0.03
GAIN, MOST_REQUESTS, POWER = 0.05, 300, 0.80


@dataclass(frozen=True)
class Traffic:
    """Requests as both versions meet them."""

    tokens: NDArray[np.int64]  # [requests]
    rates: NDArray[np.float64]  # [requests]
    domains: list[str]


def draw(rng: np.random.Generator, requests: int) -> Traffic:
    domains = [DOMAINS[i] for i in rng.integers(len(DOMAINS), size=requests)]
    mean = np.array([RATES[domain] for domain in domains])
    rates = rng.beta(mean * CONCENTRATION, (1 - mean) * CONCENTRATION)
    tokens = np.maximum(4, rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, requests)).astype(int)
    return Traffic(tokens, rates, domains)


def replay(rng: np.random.Generator, traffic: Traffic, gain: float = 0.0) -> list[RequestReplay]:
    """What one version accepts of it; ``gain`` is added to its acceptance rates."""
    own = rng.normal(0.0, OWN, len(traffic.rates))
    found = []
    for number, tokens in enumerate(traffic.tokens):
        rate = float(np.clip(traffic.rates[number] + own[number] + gain, 0.01, 0.97))
        runs = np.minimum(rng.geometric(1 - rate, int(tokens)) - 1, DEPTH)
        ends = np.cumsum(1 + runs)
        steps = int(np.searchsorted(ends, tokens)) + 1
        found.append(RequestReplay(number, steps, int(runs[:steps].sum()), traffic.domains[number]))
    return found


def gain_for(longer: float, seed: int) -> float:
    """The rise of the acceptance rates that makes the accept length longer by that share."""

    def excess(gain: float) -> float:
        rng = np.random.default_rng([seed, 1])
        traffic = draw(rng, 2000)
        before = AcceptCounts.of(replay(np.random.default_rng([seed, 2]), traffic)).accept_length
        after = AcceptCounts.of(
            replay(np.random.default_rng([seed, 2]), traffic, gain)
        ).accept_length
        return after / before - 1 - longer

    return float(brentq(excess, 0.0, 0.2, xtol=1e-3))


def tried(rng: np.random.Generator, requests: int, tries: int, gain: float = 0.0) -> int:
    """The try that passed against one live version, from 1; 0: none did."""
    for attempt in range(1, tries + 1):
        traffic = draw(rng, requests)
        before, after = replay(rng, traffic), replay(rng, traffic, gain)
        seed = int(rng.integers(1 << 31))
        if judge(before, after, attempt=attempt, seed=seed).verdict == PASS:
            return attempt
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    parser.add_argument("--comparisons", type=int, default=1000)
    parser.add_argument("--tries", type=int, default=3, help="of one candidate, null comparisons")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[12, 100], help="requests of null comparisons"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    alpha = GateSettings().alpha
    rows = []
    for requests in given.sizes:
        rng = np.random.default_rng([given.seed, requests])
        passed = sum(bool(tried(rng, requests, given.tries)) for _ in range(given.comparisons))
        p = binomtest(passed, given.comparisons, alpha, alternative="greater").pvalue
        rows.append(
            {
                "versions": "equal", "requests": requests, "tries": given.tries,
                "comparisons": given.comparisons, "passed": passed,
                "rate": passed / given.comparisons, "aim": f"<= {alpha:.0%}", "p": p,
                "met": bool(p > 0.05),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr)
    gain = gain_for(GAIN, given.seed)
    for requests in (MOST_REQUESTS,):
        rng = np.random.default_rng([given.seed, 7, requests])
        found = sum(bool(tried(rng, requests, 1, gain)) for _ in range(given.comparisons))
        rate = found / given.comparisons
        rows.append(
            {
                "versions": f"{GAIN:.0%} better", "requests": requests, "tries": 1,
                "comparisons": given.comparisons, "passed": found, "rate": rate,
                "aim": f">= {POWER:.0%}", "p": float("nan"),
                "met": rate >= POWER,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr)
    for row in rows:
        if row["p"] != row["p"]:
            row["p"] = None
    report("what passes the gate", rows, as_json=given.json, keep="gate" if given.keep else "")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
