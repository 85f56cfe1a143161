"""The processes that train one drafter together: each takes a part of every update's requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Team:
    """Process ``rank`` of ``size``. Above one, torch.distributed must be initialised."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum each tensor over the team, in place. All of one dtype, on one device."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        begin = 0
        for tensor in tensors:
            tensor.copy_(flat[begin : begin + tensor.numel()].view_as(tensor))
            begin += tensor.numel()

    def share(self, value: Any) -> Any:
        """What process 0 holds, for all of them; any object that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sums by name over the team; a name may be missing on some."""
        if self.size == 1:
            return dict(numbers)
        held: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(held, dict(numbers))
        sums: dict[str, float] = {}
        for each in held:
            for name, value in each.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums
