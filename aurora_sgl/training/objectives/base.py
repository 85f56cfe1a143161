"""The interface between the trainer and an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch

from aurora_sgl.training.objectives.settings import ObjectiveSettings


@dataclass(frozen=True)
class LoggedTokens:
    """What a server proposed after the accepted path of this step's rows, and how it fared."""

    row: torch.Tensor  # [m] int64: row of the step
    token: torch.Tensor  # [m] int64: draft id of the proposed token
    reward: torch.Tensor  # [m] float32: accepted tokens from here on, 0 for a rejected one
    group: torch.Tensor  # [m] int64: proposals of one number were siblings in one draft


@dataclass(frozen=True)
class UnrolledStep:
    """One unrolled step of one request: what the drafter says, and what the target would say.

    Row j of step k drafts from the j-th base row of the request; deeper steps have fewer rows
    (the log ends), always the first ones.
    """

    log_q: torch.Tensor  # [rows, draft_vocab] float32: the drafter, normalised
    log_p: torch.Tensor  # [rows, draft_vocab] float32: the target, renormalised to the vocabulary
    mass: torch.Tensor | None  # [rows]: the target's probability of the draft vocabulary
    token: torch.Tensor  # [rows] int64: draft id of the target's best token, -1 when outside
    weight: torch.Tensor  # [rows] float32: how much the trainer wants a position to count
    #: [rows] bool: whether the log goes on with the target's best token, so that the next step
    #: stands on a path that a greedy target would have accepted. None: it does everywhere.
    follows: torch.Tensor | None = None
    log_r: torch.Tensor | None = None  # [rows, draft_vocab]: the frozen reference drafter
    logged: LoggedTokens | None = None


@dataclass(frozen=True)
class LossContext:
    """Where in a run a loss is asked for."""

    progress: float = 0.0  # share of the run that lies behind, in [0, 1]
    key: int = 0  # of the request: the same in every pass


@dataclass(frozen=True)
class Loss:
    """The training loss, and what to log of it (plain numbers)."""

    value: torch.Tensor  # scalar
    statistics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over the unrolled steps of one request."""

    name: str  # in recipes
    needs_mass: bool  # whether a step's ``mass`` is computed (a pass of the whole lm_head)
    needs_reference: bool  # whether its ``log_r`` is computed (a pass of another drafter)
    needs_proposals: bool  # whether its ``logged`` is read (what servers proposed)

    @classmethod
    def from_settings(cls, settings: ObjectiveSettings) -> Self: ...

    def __call__(self, steps: Sequence[UnrolledStep], context: LossContext = ...) -> Loss: ...


def decayed_mean(
    losses: Sequence[torch.Tensor],  # one [rows] a step
    weights: Sequence[torch.Tensor],  # one [rows] a step
    decay: float,
) -> torch.Tensor:
    """Sum over steps k of ``decay ** k`` times the weighted mean over positions.

    Positions of weight zero stay in the mean's count, as in EAGLE3's training, so that a request
    with few useful positions pulls less.
    """
    total = losses[0].new_zeros(())
    for k, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
        if len(loss):
            total = total + decay**k * (loss * weight).mean()
    return total


def log_prob_of(step: UnrolledStep, token: torch.Tensor) -> torch.Tensor:  # [..., rows] like token
    """``log q`` of draft ids; -inf where the id is -1, a token outside the draft vocabulary."""
    index = token.reshape(-1, token.shape[-1]).T  # [rows, ...]: the gradient is one [rows, vocab]
    values = step.log_q.gather(-1, index.clamp(min=0)).masked_fill(index < 0, float("-inf"))
    return values.T.reshape(token.shape)


def on_path(step: UnrolledStep) -> torch.Tensor:  # [rows] bool
    """Whether the rows of the *next* step can still be part of an accepted draft."""
    inside = step.token >= 0
    return inside if step.follows is None else inside & step.follows
