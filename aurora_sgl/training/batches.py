"""In which order the requests of a run are trained on, and which share an update."""

from __future__ import annotations

from collections.abc import Callable

import torch


def batches(
    requests: int,
    *,
    seed: int,
    number: int,  # of the pass
    size: int = 1,
    tokens: int = 0,
    length: Callable[[int], int] | None = None,  # trained positions of a request
) -> list[list[int]]:
    """Requests by number, in the updates of one pass; a random order that only seed and pass fix.

    With ``tokens`` an update gathers whole requests until it has so many positions, otherwise it
    takes ``size`` requests.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    order = torch.randperm(requests, generator=generator).tolist()
    if not tokens:
        return [order[begin : begin + size] for begin in range(0, requests, size)]
    assert length is not None
    updates: list[list[int]] = []
    held = tokens
    for index in order:
        if held >= tokens:
            updates.append([])
            held = 0
        updates[-1].append(index)
        held += length(index)
    return updates
