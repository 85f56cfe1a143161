"""Accept lengths by exact replay, and what the learning benchmarks say about them.

Sums are kept for each request, so that intervals can be drawn from a file of results later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aurora_sgl import intervals
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.device import as_served
from aurora_sgl.evaluation.replay import replay_one
from aurora_sgl.evaluation.settings import EvaluationSettings
from aurora_sgl.sequences.sequence import Sequences

SHAPES = {"chain": DraftShape(4), "tree": DraftShape(4, 4, 16)}

#: by shape: ``accepted`` and ``steps``, one number a request in each
Measured = dict[str, dict[str, list[int]]]


def measure(drafter: Drafter, sequences: Sequences, head: TargetHead) -> Measured:
    """Replay of every request in every shape, with bfloat16 weights as a server has them."""
    served = as_served(drafter, EvaluationSettings())
    found: Measured = {name: {"accepted": [], "steps": []} for name in SHAPES}
    for index in range(len(sequences)):
        sequence = sequences[index]
        for name, shape in SHAPES.items():
            one = replay_one(served, sequence, shape, head)
            found[name]["accepted"].append(one.accepted)
            found[name]["steps"].append(one.verify_steps)
    return found


def accept_length(measured: Mapping[str, Any], shape: str) -> float:
    """1 + accepted / verify steps over all requests."""
    sums = measured[shape]
    return intervals.accept_length(sum(sums["accepted"]), sum(sums["steps"]))


def paired(a: Mapping[str, Any], b: Mapping[str, Any], shape: str) -> intervals.Difference:
    """b less a on the same requests, with an interval by request."""
    return intervals.paired_difference(
        list(
            zip(
                a[shape]["accepted"],
                a[shape]["steps"],
                b[shape]["accepted"],
                b[shape]["steps"],
                strict=True,
            )
        )
    )


def pooled_by_request(by_domain: Mapping[str, Sequence[Mapping[str, Any]]]) -> Measured:
    """Measurements of several seeds and domains as one: sums of a request over seeds, then the
    domains' requests side by side. A request stays one unit of what is resampled."""
    found: Measured = {shape: {"accepted": [], "steps": []} for shape in SHAPES}
    for seeds in by_domain.values():
        for shape, sums in found.items():
            for name, values in sums.items():
                values += np.sum([one[shape][name] for one in seeds], axis=0).tolist()
    return found


def lengths(
    sums: Mapping[str, Sequence[int]],
    picks: np.ndarray,  # [draws, requests] int
) -> np.ndarray:  # [draws]
    """Accept lengths of resampled requests."""
    accepted, steps = np.asarray(sums["accepted"]), np.asarray(sums["steps"])
    sums_of = accepted[picks].sum(1), np.maximum(1, steps[picks].sum(1))
    return np.array([intervals.accept_length(y, n) for y, n in zip(*sums_of, strict=True)])


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")


def spread(values: Iterable[float]) -> float:
    """Standard deviation over seeds; nan for one."""
    found = list(values)
    return float(np.std(found, ddof=1)) if len(found) > 1 else float("nan")
