"""The interface between the trainer and an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """One unrolled step of one or several requests: what the drafter says, and what the target
    would say.

    A row drafts from one base row. Deeper steps have fewer rows: a log ends, or the objective's
    ``reach`` leaves some out.
    """

    log_q: torch.Tensor  # [rows, draft_vocab] float32: the drafter, normalised
    log_p: torch.Tensor  # [rows, draft_vocab] float32: the target, renormalised to the vocabulary
    mass: torch.Tensor | None  # [rows]: the target's probability of the draft vocabulary
    token: torch.Tensor  # [rows] int64: draft id of the target's best token, -1 when outside
    #: [rows] float32: how much a position counts, so that the mean over the rows that are here adds
    #: up to that over a whole request, and over all parts of an update.
    weight: torch.Tensor
    #: [rows] bool: whether the log goes on with the target's best token, so that the next step
    #: stands on a path that a greedy target would have accepted. None: it does everywhere.
    follows: torch.Tensor | None = None
    log_r: torch.Tensor | None = None  # [rows, draft_vocab]: the frozen reference drafter
    logged: LoggedTokens | None = None
    #: [rows] int64: draft id of the token with which the log goes on, -1 when outside. None: the
    #: target's best one.
    after: torch.Tensor | None = None
    sampled: torch.Tensor | None = None  # [rows] bool: the log is a draw from the target's law
    parent: torch.Tensor | None = None  # [rows] int64: row of the step before; None: the first ones

    def from_before(self, values: torch.Tensor) -> torch.Tensor:  # [..., rows]
        """Values by row of the step before [..., rows before], for the rows of this one."""
        rows = len(self.token)
        return values[..., :rows] if self.parent is None else values[..., self.parent]

    @property
    def next_token(self) -> torch.Tensor:  # [rows] int64
        return self.token if self.after is None else self.after


@dataclass(frozen=True)
class LossContext:
    """Where in a run a loss is asked for."""

    progress: float = 0.0  # share of the run that lies behind, in [0, 1]
    key: int = 0  # of the request: the same in every pass


@dataclass(frozen=True)
class Loss:
    """The training loss, and what to log of it (numbers, or scalars that are still on a device)."""

    value: torch.Tensor  # scalar
    statistics: Mapping[str, float | torch.Tensor] = field(default_factory=dict)


#: As ``reference_from``: without a reference.
NEVER = float("inf")


class Objective(Protocol):
    """A loss over the unrolled steps of the requests of an update."""

    name: str  # in recipes
    needs_mass: bool  # whether a step's ``mass`` is computed (a pass of the whole lm_head)
    needs_proposals: bool  # whether ``logged`` is read; then it is asked request by request
    #: Share of the run from which a frozen copy of the drafter gives ``log_r``, as it is then.
    reference_from: float
    #: A row's next step is computed only where the log's path so far lies in the drafter's
    #: ``reach`` most likely tokens at each step; 0: all rows are.
    reach: int

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


def within_top(
    scores: torch.Tensor,  # [rows, vocab]
    token: torch.Tensor,  # [rows] int64, -1: outside
    topk: int,
) -> torch.Tensor:  # [rows] bool
    """Whether fewer than ``topk`` tokens score higher."""
    own = scores.gather(-1, token.clamp(min=0)[:, None])
    return (token >= 0) & ((scores > own).sum(-1) < topk)


def on_path(step: UnrolledStep) -> torch.Tensor:  # [rows] bool
    """Whether the rows of the *next* step can still be part of an accepted draft."""
    inside = step.token >= 0
    return inside if step.follows is None else inside & step.follows


def kl_to_reference(step: UnrolledStep) -> torch.Tensor:  # [rows]
    """KL(q || reference), exact."""
    assert step.log_r is not None
    return (step.log_q.exp() * (step.log_q - step.log_r)).sum(-1)


def reference_loss(steps: Sequence[UnrolledStep], decay: float) -> torch.Tensor:
    """KL(q || reference) over all steps, see :func:`decayed_mean`."""
    return decayed_mean([kl_to_reference(s) for s in steps], [s.weight for s in steps], decay)


def entropy(step: UnrolledStep) -> torch.Tensor:
    """Of the drafter in nats, mean over rows; without a gradient."""
    log_q = step.log_q.detach()
    return -(log_q.exp() * log_q).sum(-1).mean()
