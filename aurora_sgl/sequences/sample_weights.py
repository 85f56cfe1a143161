"""How much a request, and a position in it, counts in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from aurora_sgl.store.queries.requests import RecentRequest


def by_recency(
    rows: Sequence[RecentRequest],  # newest first
    half_life: float,
) -> dict[int, float]:
    """``0.5 ** (newer requests / half_life)`` for each request id, scaled to a mean of 1.

    Age is counted in requests, so that a quiet night ages nothing. Half life 0: all alike.
    """
    if not half_life or not rows:
        return {row.request_id: 1.0 for row in rows}
    raw = {row.request_id: 0.5 ** (age / half_life) for age, row in enumerate(rows)}
    mean = sum(raw.values()) / len(raw)
    return {request_id: weight / mean for request_id, weight in raw.items()}


def by_rejection(
    steps: Iterable[Mapping[str, Any]],  # verify steps in order, as queries.events returns them
    rows: int,
    output_start: int,
    after_rejection: float,
) -> torch.Tensor:  # [rows] float32
    """Weights of base rows from what the serving drafter did there.

    The draft from a root at position r comes from base row r - 1. Where it follows a rejection its
    row weighs ``1 + (after_rejection - 1) (1 - accepted / depth)``: most where the next draft broke
    off at once as well. Answer rows are scaled to a mean of 1, so that a request pulls as much as
    without these weights.
    """
    weight = torch.ones(rows)
    rejected = False
    for step in steps:
        base = step["position"] - 2
        if rejected and step["depth"] and 0 <= base < rows:
            weight[base] += (after_rejection - 1) * (1 - step["accepted"] / step["depth"])
        rejected = bool(step["depth"]) and step["first_rejected_at"] > 0
    answer = weight[max(0, output_start - 1) :]
    if len(answer) and float(answer.mean()) > 0:
        answer /= answer.mean()
    return weight
