"""Base against candidate, by exact replay on requests that no run has trained on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.training.replay import Replayed, replay_one
from aurora_sgl.training.sequence import Sequence
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.statistics import PairedDifference, paired_difference
from aurora_sgl.training.trainer import device_of, served_dtype


@dataclass(frozen=True)
class GateResult:
    """``verdict`` is pass, fail or inconclusive; ``by_domain`` holds the same, by domain."""

    paired: PairedDifference
    verdict: str
    by_domain: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate(
    base: Drafter,
    candidate: Drafter,
    sequences: Iterable[Sequence],
    head: TargetHead,
    settings: TrainSettings,
) -> GateResult:
    """Replay both drafters in the served dtype and draft shape on the greedy ones among these.

    Pass: the whole 95% interval of the paired difference lies above zero. Fail: it lies below.
    Anything else, and too few requests, is inconclusive.
    """
    dtype = served_dtype(settings)
    old, new = (copy.deepcopy(d).to(device_of(settings), dtype).eval() for d in (base, candidate))
    head = head.to(device_of(settings))
    before: list[Replayed] = []
    after: list[Replayed] = []
    for sequence in sequences:
        if sequence.greedy:
            before.append(replay_one(old, sequence, settings.shape, head))
            after.append(replay_one(new, sequence, settings.shape, head))
    paired = paired_difference(before, after, seed=settings.seed)
    by_domain = {}
    for domain in sorted({r.domain for r in before}):
        part = paired_difference(
            [r for r in before if r.domain == domain],
            [r for r in after if r.domain == domain],
            seed=settings.seed,
        )
        by_domain[domain] = {
            "requests": part.requests,
            "baseline": part.a,
            "candidate": part.b,
            "ci_low": part.ci_low,
            "ci_high": part.ci_high,
        }
    return GateResult(paired, _verdict(paired, settings.min_gate_requests), by_domain)


def _verdict(paired: PairedDifference, fewest: int) -> str:
    if paired.requests < max(2, fewest):
        return "inconclusive"
    if paired.ci_low > 0:
        return "pass"
    return "fail" if paired.ci_high < 0 else "inconclusive"
