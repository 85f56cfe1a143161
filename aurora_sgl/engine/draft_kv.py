"""Which drafter made the draft KV of each place in the KV cache.

A swap leaves the prefix cache as it is, draft KV of the old drafter with it: that costs acceptance,
never a token. But a request that reuses such KV says nothing about the new drafter alone. So each
place that a step writes is marked with the drafter of that step, and what a request finds in the
cache is looked up by its places, whatever kind of tree or table SGLang finds them in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_NOBODY = -1  # no draft KV: a plain step, or nothing yet
_UNKNOWN = -2


@dataclass(slots=True)
class LiveVersion:
    """What the drafter is at this moment, as far as records need it."""

    version_id: int = 0
    swap_count: int = 0
    steps_since_swap: int = 0
    maker: int = 0  # number of these weights; a version that comes back has its old one
    _makers: dict[int, int] = field(default_factory=dict)  # by version

    def identified(self, version_id: int) -> None:
        """The sidecar says which version the server was started with."""
        if self.swap_count == 0:
            self.version_id = version_id
            self._makers = {version_id: self.maker}

    def swapped(self, version_id: int) -> None:
        self.swap_count += 1
        self.steps_since_swap = 0
        self.version_id = version_id
        self.maker = self._makers.setdefault(version_id, self.swap_count)


class DraftKV:
    """The marks of one server's KV cache, 4 bytes a token, on its device."""

    def __init__(self, places: int, device: torch.device | str) -> None:
        self._maker = torch.full((places,), _NOBODY, dtype=torch.int32, device=device)
        self._sure = True

    def mark(self, places: torch.Tensor, maker: int | None) -> None:
        """A step wrote to these places; ``maker`` None: it made no draft KV there."""
        self._settle()
        self._maker[self._inside(places)] = _NOBODY if maker is None else maker

    def strangers(self, places: torch.Tensor, head: int, maker: int) -> torch.Tensor:  # [3] int64
        """How many of these places hold no draft KV of this maker; how many hold another's; and
        how many of the first ``head`` do."""
        self._settle()
        makers = self._maker[self._inside(places)]
        not_mine = makers != maker
        others = not_mine & (makers != _NOBODY)
        return torch.stack([not_mine.sum(), others.sum(), others[:head].sum()])

    def doubt(self) -> None:
        """A step was not marked: what was made before is of nobody known."""
        self._sure = False

    def _settle(self) -> None:
        if not self._sure:
            self._maker.fill_(_UNKNOWN)
            self._sure = True

    def _inside(self, places: torch.Tensor) -> torch.Tensor:
        # A wrong index would end a CUDA process; here it costs one wrong mark.
        return places.to(torch.int64).clamp(0, len(self._maker) - 1)
