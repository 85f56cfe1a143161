"""Why a version passed no gate, and on how many requests a verdict rests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aurora_sgl.store.models import Evaluation

PASS = "pass"
HEADS = {"inconclusive": "Why it was not judged", "fail": "Why it failed"}


def why_not(evaluation: Evaluation | None) -> str:
    """The reason of the newest comparison; empty when it passed or there was none."""
    if evaluation is None or evaluation.verdict == PASS:
        return ""
    return str(evaluation.details.get("reason") or "no reason was kept")


def told(evaluation: Evaluation) -> list[str]:
    """Sentences under a comparison."""
    lines = []
    if reason := why_not(evaluation):
        lines.append(f"{HEADS.get(evaluation.verdict, 'Why it did not pass')}: {reason}")
    if judged := evaluation.details.get("judged"):
        lines.append(_judged(judged))
    return lines


def _judged(judged: Mapping[str, Any]) -> str:
    """``9 held-out requests could be judged; left out: 3 rejection sampling``."""
    lost = {name: count for name, count in dict(judged.get("left_out") or {}).items() if count}
    said = f"{judged.get('requests', 0):,} held-out requests could be judged"
    if lost:
        listed = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in sorted(lost.items()))
        said += f"; left out: {listed}"
    return f"{said}."
