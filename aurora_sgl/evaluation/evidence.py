"""Evidence that a candidate is better, which may be looked at after every try.

Both versions replay the same tokens, so the better one takes fewer verify steps for them. Were they
equal, each conversation would be as likely to save so many steps as to lose them: its difference x
has a symmetric law, whatever the lengths, the domains and the turns. For every b the product of
``1 + tanh(b x)`` over conversations then has expectation 1 (tanh is odd), and so has a mean of such
products over several b: an e-value. A product of e-values over ever new conversations exceeds
``1 / alpha`` at any time with probability alpha at most (Ville's inequality; Ramdas et al. 2023,
"Game-theoretic statistics and safe anytime-valid inference", arXiv 2210.01948).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from aurora_sgl.evaluation.replay import RequestReplay

Pair = tuple["RequestReplay", "RequestReplay"]

#: Bets in root mean squares of x, with their shares: 0.1 to 0.4 is a gain of 2 to 10% on 200
#: requests as ``benchmarks.gate`` draws them, 2 what training from nothing brings.
BETS = ((0.1, 0.3), (0.2, 0.3), (0.4, 0.2), (0.8, 0.1), (2.0, 0.1))
#: The same where so few conversations are there that only a large gain can be proven: five that
#: all gain about as much are enough.
FEW, BETS_OF_FEW = 12, ((0.4, 0.15), (0.8, 0.15), (3.0, 0.7))


def conversation_of(replayed: RequestReplay) -> str:
    """The cluster of a request: its conversation, or itself where none is known."""
    return replayed.conversation or f"request {replayed.request_id}"


def steps_saved(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """For each conversation the verify steps that the candidate saves on its tokens, over the root
    of the tokens: long conversations differ by more. Shape: [conversations].

    The end of an answer may be undetermined for one version and not for the other, so that steps
    are taken a token covered, times the tokens that both cover.
    """
    sums: dict[str, tuple[float, float]] = {}
    for old, new in pairs:
        if not old.verify_steps or not new.verify_steps:
            continue
        covered = [r.verify_steps + r.accepted for r in (old, new)]
        common = min(covered)
        saved = common * (old.verify_steps / covered[0] - new.verify_steps / covered[1])
        before = sums.get(conversation_of(old), (0.0, 0.0))
        sums[conversation_of(old)] = before[0] + saved, before[1] + common
    return np.array([saved / math.sqrt(tokens) for saved, tokens in sums.values()], dtype=float)


def log_evidence(saved: NDArray[np.float64]) -> float:
    """Natural logarithm of the e-value of :func:`steps_saved`; 0 where nothing differs.

    Scaling by the root mean square keeps the expectation at 1: it depends on the sizes alone, and
    given the sizes the signs are a coin's.
    """
    scale = math.sqrt(float(np.mean(saved**2))) if len(saved) else 0.0
    if not scale:
        return 0.0
    bets, shares = np.array(BETS_OF_FEW if len(saved) <= FEW else BETS).T
    # log(1 + tanh u) = log 2 - log(1 + exp(-2 u))
    terms = math.log(2) - np.logaddexp(0, -2 * np.outer(bets, saved / scale))
    return float(np.logaddexp.reduce(terms.sum(1) + np.log(shares)))
