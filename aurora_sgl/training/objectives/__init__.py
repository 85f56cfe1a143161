"""What training makes small: one file an objective, behind :class:`base.Objective`."""

from __future__ import annotations

from collections.abc import Callable

from aurora_sgl.errors import AuroraError
from aurora_sgl.training.objectives.base import Logged, Loss, Moment, Objective, Step
from aurora_sgl.training.objectives.distil_then_rl import DistilThenRL
from aurora_sgl.training.objectives.expected_accept_length import ExpectedAcceptLength
from aurora_sgl.training.objectives.forward_kl import ForwardKL
from aurora_sgl.training.objectives.lk import LK
from aurora_sgl.training.objectives.policy_gradient import PolicyGradient

__all__ = ["NAMES", "Logged", "Loss", "Moment", "Objective", "Step", "make"]


def _distil(decay: float, topk: int, rl_share: float, seed: int) -> Objective:
    return ForwardKL(step_decay=decay)


def _lk(decay: float, topk: int, rl_share: float, seed: int) -> Objective:
    return LK(step_decay=decay)


def _expected(decay: float, topk: int, rl_share: float, seed: int) -> Objective:
    return ExpectedAcceptLength(step_decay=decay, topk=topk)


def _reinforce(decay: float, topk: int, rl_share: float, seed: int) -> Objective:
    return PolicyGradient(step_decay=decay, seed=seed)


def _distil_then_reinforce(decay: float, topk: int, rl_share: float, seed: int) -> Objective:
    return DistilThenRL(step_decay=decay, rl_share=rl_share, seed=seed)


_MAKERS: dict[str, Callable[[float, int, float, int], Objective]] = {
    "forward_kl": _distil,
    "lk": _lk,
    "expected_accept_length": _expected,
    "policy_gradient": _reinforce,
    "distil_then_rl": _distil_then_reinforce,
}
NAMES = tuple(_MAKERS)


def make(
    name: str, *, step_decay: float = 0.8, topk: int = 1, rl_share: float = 0.3, seed: int = 0
) -> Objective:
    """An objective by name. Raises ``AuroraError`` for an unknown one.

    ``topk`` is that of the served drafts; ``rl_share`` the part of a run at whose end
    reinforcement learning goes on top, where the objective has such a part.
    """
    if name not in _MAKERS:
        raise AuroraError(f"unknown objective {name}: choose one of {', '.join(NAMES)}")
    return _MAKERS[name](step_decay, topk, rl_share, seed)
