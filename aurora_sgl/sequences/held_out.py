"""How many of a group's held-out requests can be judged, and why the others can't."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from aurora_sgl.sequences.splits import GATE_SHARE, split_key, split_of, why_not_judged
from aurora_sgl.store import queries
from aurora_sgl.store.queries.requests import RecentRequest

REACH = 5000  # newest requests with a trace that a run knows of

_REASONS = {
    "penalties": "with penalties",
    "processor": "with a logit processor",
    "short": "with hardly an answer",
    "block_verification": "sampled by block verification",
    "unknown_law": "sampled by rejection from what is not known",
    "mixed_rules": "of several accept rules",
    "unknown_rule": "of an unknown accept rule",
    "prefix": "whose cached prefix has no trace",
    "broken": "whose trace is missing or broken",
    "duplicate": "that nearly repeat a prompt on another side",
}


#: Accept rules as people read them.
RULES = {
    "greedy": "greedy",
    "target_sampling": "sampled",
    "rejection_sampling": "sampled by rejection",
}


@dataclass(frozen=True)
class HeldOut:
    """Requests that no run trains on: how many a verdict can rest on, of these by accept rule, and
    the others by reason."""

    judged: int
    left_out: dict[str, int] = field(default_factory=dict)
    by_rule: dict[str, int] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """For people, such as ``12 held-out requests can be judged: 8 greedy, 4 sampled (3 with
        penalties left out)``."""
        rules = ", ".join(f"{n} {RULES.get(rule, rule)}" for rule, n in self.by_rule.items())
        return (
            f"{self.judged} held-out requests can be judged{': ' if rules else ''}{rules}"
            f"{left_out_in_words(self.left_out)}"
        )


def left_out_in_words(left_out: Mapping[str, int]) -> str:
    """`` (3 sampled by rejection left out)``, or nothing."""
    parts = [f"{count} {_REASONS.get(reason, reason)}" for reason, count in left_out.items()]
    return f" ({', '.join(parts)} left out)" if parts else ""


def held_out_counts(s: Session, group_id: int, *, gate_share: float = GATE_SHARE) -> HeldOut:
    """Of the newest ``REACH`` requests with a trace. A run may leave out some more: what a trace
    file holds is only known once it is read."""
    rows = [
        row
        for row in queries.requests.recent_requests(s, group_id, limit=REACH)
        if split_of(split_key(row), dev_share=0.0, gate_share=gate_share) == "gate"
    ]
    reasons = [why_not_judged(row) for row in rows]
    judged = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    return held_out_of(judged, Counter(filter(None, reasons)))


def held_out_of(judged: Iterable[RecentRequest], left_out: Mapping[str, int]) -> HeldOut:
    """``judged``: the requests themselves; ``left_out``: the others by reason."""
    rules = Counter(row.accept_rule for row in judged)
    return HeldOut(sum(rules.values()), dict(sorted(left_out.items())), dict(sorted(rules.items())))
