"""Why a version passed no gate, and on how many requests a verdict rests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aurora_sgl.store.models import Evaluation

PASS = "pass"
HEADS = {"inconclusive": "Why it was not judged", "fail": "Why it failed"}


#: Verdicts on single domains, in the order in which they matter to who decides.
ORDER = ("fail", "inconclusive", "pass")


def worst_first(
    domains: Mapping[str, Mapping[str, Any]], most: int
) -> list[tuple[str, Mapping[str, Any]]]:
    """Comparisons by domain, by name; where there are more than ``most``, which are all that is
    shown, those that speak against a version first, then those of the most requests."""
    listed = sorted(domains.items())
    if len(listed) > most:
        listed.sort(key=lambda one: _weight(one[1]))
    return listed


def _weight(comparison: Mapping[str, Any]) -> tuple[int, int]:
    verdict = comparison.get("verdict")
    place = ORDER.index(verdict) if verdict in ORDER else len(ORDER)
    return place, -int(comparison.get("requests") or 0)


def why_not(evaluation: Evaluation | None) -> str:
    """The reason of the newest comparison; empty when it passed or there was none."""
    if evaluation is None or evaluation.verdict == PASS:
        return ""
    return str(evaluation.details.get("reason") or "no reason was kept")


def told(evaluation: Evaluation) -> list[str]:
    """Sentences under a comparison; requests are counted once, there or in the reason."""
    lines, reason = [], why_not(evaluation)
    if reason:
        lines.append(f"{HEADS.get(evaluation.verdict, 'Why it did not pass')}: {reason}.")
    judged = evaluation.details.get("judged")
    if judged and "can be judged" not in reason:
        lines.append(_judged(judged))
    if evaluation.details.get("line"):
        lines.append(_line(evaluation))
    return lines


def level(evaluation: Evaluation) -> str:
    """Of the interval that is shown: kept with it, or by what its try spent of an allowance."""
    spent = evaluation.alpha
    share = evaluation.details.get("level") or (0.95 if spent is None else 1 - 2 * spent)
    return f"{100 * float(share):.4g}%"


def _line(evaluation: Evaluation) -> str:
    """``Try 3 against version 1: evidence 12 of the 20 that pass; 40 conversations were new.``"""
    line = dict(evaluation.details["line"])
    evidence = math.exp(min(float(line.get("log_e") or 0.0), 20.0))
    alpha = float(dict(evaluation.details.get("settings") or {}).get("alpha") or 0.05)
    which = f"Try {evaluation.attempt}" if evaluation.attempt else "No try"
    return (
        f"{which} against version {evaluation.baseline_id}: evidence {evidence:,.3g} of the "
        f"{1 / alpha:.0f} that pass; {int(line.get('fresh') or 0):,} conversations were new."
    )


def _judged(judged: Mapping[str, Any]) -> str:
    """``It rests on 40 held-out requests; left out: 3 rejection sampling.``"""
    requests = int(judged.get("requests") or 0)
    sentence = f"It rests on {requests:,} held-out request{'' if requests == 1 else 's'}"
    lost = {name: count for name, count in dict(judged.get("left_out") or {}).items() if count}
    if lost:
        listed = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in sorted(lost.items()))
        sentence += f"; left out: {listed}"
    return f"{sentence}."
