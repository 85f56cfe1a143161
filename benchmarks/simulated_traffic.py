"""Requests as two versions meet them, for simulations of the gate and the watch.

A request has a log-normal number of output tokens and its own acceptance rate, drawn from a beta
distribution (requests differ by far more than chance within one). Both versions answer the same
one, so a request that is easy for one is easy for the other. Requests come in conversations of
several turns that resemble each other; domains are unequally large (a Zipf law), and a part of the
conversations is sampled, which accepts less. A step accepts a chain of up to ``DEPTH`` proposals.
What each version is better or worse at by itself has a share of the conversation and one of the
request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aurora_sgl.evaluation.replay import RequestReplay

Floats = NDArray[np.float64]

DEPTH = 4
#: Mean acceptance rates of a proposal, one domain after the other; accept lengths of 1.6 to 2.4, as
#: in the demo.
RATES = (0.40, 0.50, 0.62)
#: What sampling takes from them.
SAMPLED = 0.06
#: Beta concentration of a conversation's rate around its domain's: with ``TURN``, the deviation of
#: a turn, a standard deviation of about 0.13, which is what the demo's served requests had.
CONCENTRATION, TURN = 18.0, 0.07
#: Median of output tokens; spread of their logarithm.
MEDIAN_TOKENS, SPREAD = 60.0, 0.6
#: The two versions agree on most requests but not on all: deviation of a version's own rate, the
#: conversation's part and the request's (0.03 together).
OWN = 0.021
#: Accept lengths of a chain by its rate.
_RATES = np.linspace(0.005, 0.99, 2000)
_LENGTHS = sum(_RATES**power for power in range(DEPTH + 1))


@dataclass(frozen=True)
class Mix:
    """What traffic is made of. ``domains``: how many, or their shares."""

    domains: int | tuple[float, ...] = 3
    turns: float = 1.0  # of a conversation, on the mean
    sampled: float = 0.0  # share of conversations
    spread: float = SPREAD

    @property
    def shares(self) -> Floats:
        if not isinstance(self.domains, int):
            return np.array(self.domains) / sum(self.domains)
        weights = 1 / np.arange(1, self.domains + 1) ** 0.7
        return np.asarray(weights / weights.sum())


#: 20 domains, the largest with 18% of the conversations, the smallest with 2%; chats, some sampled,
#: some very long.
MANY = Mix(domains=20, turns=2.0, sampled=0.3, spread=1.0)


@dataclass(frozen=True)
class Traffic:
    """Requests as both versions meet them; all of shape [requests]."""

    tokens: NDArray[np.int64]
    rates: Floats
    domains: NDArray[np.int64]
    conversations: NDArray[np.int64]
    sampled: NDArray[np.bool_]
    first_id: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


def draw(
    rng: np.random.Generator, requests: int, mix: Mix | None = None, first_id: int = 0
) -> Traffic:
    """Whole conversations, the last cut short."""
    mix = mix or Mix()
    turns = rng.geometric(1 / mix.turns, requests)
    of = np.repeat(np.arange(requests), turns)[:requests]
    count = int(of.max(initial=-1)) + 1
    domains = rng.choice(len(mix.shares), size=count, p=mix.shares)
    sampled = rng.random(count) < mix.sampled
    mean = np.resize(RATES, len(mix.shares))[domains] - SAMPLED * sampled
    rates = rng.beta(mean * CONCENTRATION, (1 - mean) * CONCENTRATION)[of]
    rates = np.clip(rates + rng.normal(0, TURN, requests), 0.02, 0.95)
    tokens = np.maximum(4, rng.lognormal(np.log(MEDIAN_TOKENS), mix.spread, requests)).astype(int)
    return Traffic(tokens, rates, domains[of], of + first_id, sampled[of], first_id)


def replay(
    rng: np.random.Generator, traffic: Traffic, gain: float = 0.0, *, longer: float | Floats = 0.0
) -> list[RequestReplay]:
    """What one version accepts of it. ``gain`` is added to its acceptance rates; ``longer``: by
    which share its accept length is longer than the usual, on the whole or by domain; shape
    [domains]."""
    longer = np.asarray(longer)
    share = longer[traffic.domains] if longer.ndim else longer
    _, of = np.unique(traffic.conversations, return_inverse=True)
    own = rng.normal(0, OWN, len(traffic))[of] + rng.normal(0, OWN, len(traffic))
    usual = np.interp(traffic.rates, _RATES, _LENGTHS)
    rates = np.clip(np.interp(usual * (1 + share), _LENGTHS, _RATES) + gain + own, 0.01, 0.97)
    steps, accepted = _walk(rng, traffic.tokens, rates)
    return [
        RequestReplay(
            traffic.first_id + number, int(n), int(y), f"domain {domain}",
            "target_sampling" if sampled else "greedy", f"conversation {conversation}",
        )
        for number, (n, y, domain, sampled, conversation) in enumerate(
            zip(steps, accepted, traffic.domains, traffic.sampled, traffic.conversations,
                strict=True)
        )
    ]  # fmt: skip


def _walk(
    rng: np.random.Generator, tokens: NDArray[np.int64], rates: Floats
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Determined steps of each request, and what they accept (see ``evaluation.replay``)."""
    steps, accepted = np.zeros_like(tokens), np.zeros_like(tokens)
    for part in np.array_split(np.argsort(tokens), 1 + len(tokens) // 30) if len(tokens) else ():
        runs = rng.geometric(1 - rates[part, None], (len(part), int(tokens[part].max()))) - 1
        runs = np.minimum(runs, DEPTH)
        begin = np.cumsum(1 + runs, 1) - 1 - runs
        left = tokens[part, None] - begin
        determined = (left >= 1) & ((runs < left) | (left >= DEPTH))
        determined = np.logical_and.accumulate(determined, 1)
        steps[part] = determined.sum(1)
        accepted[part] = (runs * determined).sum(1)
    return steps, accepted
