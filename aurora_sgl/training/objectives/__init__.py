"""What training makes small: one file an objective, behind :class:`base.Objective`."""

from __future__ import annotations

from collections.abc import Callable

from aurora_sgl.errors import AuroraError
from aurora_sgl.training.objectives.base import Objective, Step
from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.lk import LK

__all__ = ["NAMES", "Objective", "Step", "make"]

_MAKERS: dict[str, Callable[..., Objective]] = {"forward_kl": ForwardKL, "lk": LK}
NAMES = tuple(_MAKERS)


def make(name: str, *, step_decay: float = 0.8) -> Objective:
    """An objective by name. Raises ``AuroraError`` for an unknown one."""
    if name not in _MAKERS:
        raise AuroraError(f"unknown objective {name}: choose one of {', '.join(NAMES)}")
    return _MAKERS[name](step_decay=step_decay)
