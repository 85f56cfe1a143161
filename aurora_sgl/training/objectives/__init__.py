"""Training losses: one module each, behind :class:`base.Objective`."""

from __future__ import annotations

from aurora_sgl.errors import AuroraError
from aurora_sgl.training.objectives.base import (
    LoggedTokens,
    Loss,
    LossContext,
    Objective,
    UnrolledStep,
)
from aurora_sgl.training.objectives.distil_then_rl import DistilThenRL
from aurora_sgl.training.objectives.expected_accept_length import ExpectedAcceptLength
from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.lk import LK
from aurora_sgl.training.objectives.policy_gradient import PolicyGradient
from aurora_sgl.training.objectives.reach_kl import ReachKL
from aurora_sgl.training.objectives.settings import ObjectiveSettings
from aurora_sgl.training.objectives.tree_reward import TreeReward

__all__ = [
    "OBJECTIVES",
    "LoggedTokens",
    "Loss",
    "LossContext",
    "Objective",
    "UnrolledStep",
    "make",
    "named",
]

_ALL: tuple[type[Objective], ...] = (
    ForwardKL,
    LK,
    ExpectedAcceptLength,
    PolicyGradient,
    DistilThenRL,
    ReachKL,
    TreeReward,
)
#: By the name in recipes.
OBJECTIVES: dict[str, type[Objective]] = {one.name: one for one in _ALL}


def named(name: str) -> type[Objective]:
    """Raises ``AuroraError`` for an objective that is not in the table."""
    if name not in OBJECTIVES:
        raise AuroraError(f"unknown objective {name}: choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def make(settings: ObjectiveSettings) -> Objective:
    """The objective of a recipe. Raises ``AuroraError`` for an unknown one."""
    return named(settings.objective).from_settings(settings)
