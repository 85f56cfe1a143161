"""One update: the losses of its requests, their gradient, a step, and the averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.errors import AuroraError
from aurora_sgl.sequences.sequence import Sequences
from aurora_sgl.training.loss import SequenceLoss
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.team import Team


@dataclass
class Update:
    """What one update saw, over the whole team."""

    loss: float = float("nan")  # mean over trained positions; nan: there were none, and no step
    seconds: float = 0.0  # as process 0 has them, so that all judge time alike
    positions: int = 0
    unreadable: int = 0
    why: str = ""  # of the last request that could not be trained on, on this process
    statistics: dict[str, float] = field(default_factory=dict)  # of the objective, means


class Learner:
    """The drafter that is trained, and all that an update changes."""

    def __init__(
        self,
        drafter: Drafter,  # float32, on the device; changed in place
        sequences: Sequences,
        head: TargetHead,
        settings: TrainSettings,
        team: Team,
    ) -> None:
        self.drafter = drafter.train().requires_grad_(True)
        self.average = copy.deepcopy(drafter).requires_grad_(False).eval()
        self.sequences, self.settings, self.team = sequences, settings, team
        self.loss_of = SequenceLoss(drafter, head, settings)
        self.parameters = list(drafter.parameters())
        self.optimizer = _optimizer(drafter, settings)
        self.updates = 0

    def update(
        self,
        batch: List[int],  # requests by number
        *,
        rate: float,  # share of the peak rate
        done: float,  # share of the run
        seconds: float = 0.0,
    ) -> Update:
        """One step on the mean loss over the trained positions of all requests of the batch.

        Each process of the team takes every ``size``-th request. Raises ``AuroraError``, in all of
        them, when the loss is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        mine = batch[self.team.rank :: self.team.size]
        alone = len(batch) == 1  # then its own mean is the mean
        update, total = Update(), 0.0
        sums: dict[str, float] = {}
        for index in mine:
            count, value = self._backward(index, done, alone, update, sums)
            update.positions += count
            total += count * value
        whole = torch.tensor(
            [total, update.positions, update.unreadable, 0.0 if self.team.rank else seconds],
            dtype=torch.float64,
        )
        self.team.add([whole])
        total, positions, unreadable, update.seconds = whole.tolist()
        update.positions, update.unreadable = int(positions), int(unreadable)
        if not math.isfinite(total):
            raise AuroraError(f"the loss is not finite at update {self.updates}: training stopped")
        update.statistics = {
            name: value / max(1, update.positions) for name, value in self.team.total(sums).items()
        }
        if update.positions:
            self._step(1.0 if alone else 1.0 / update.positions, rate)
            update.loss = total / update.positions
        return update

    def _backward(
        self, index: int, done: float, alone: bool, update: Update, sums: dict[str, float]
    ) -> tuple[int, float]:
        """Add a request's gradient, times its positions unless it is alone; (positions, loss)."""
        try:
            sequence = self.sequences[index].to(self.drafter.device)
        except AuroraError as error:  # its file went or broke since the window was chosen
            update.unreadable += 1
            update.why = str(error)
            return 0, 0.0
        first, last = self.loss_of.rows(sequence)
        count, value = max(0, last - first), 0.0
        for piece in self.loss_of.pieces(index, sequence, done=done):
            loss = piece.value if alone else piece.value * count
            loss.backward()  # type: ignore[no-untyped-call]
            value += piece.value.item()
            for name, number in piece.statistics.items():
                sums[name] = sums.get(name, 0.0) + piece.positions * number
        return count, value

    def _step(self, scale: float, rate: float) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.team.add(gradients)
        if scale != 1:
            for gradient in gradients:
                gradient.mul_(scale)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate
        self.optimizer.step()
        self._average()
        self.updates += 1

    @torch.no_grad()
    def _average(self) -> None:
        """Average of the weights, corrected for its short memory in the first updates."""
        keep = min(self.settings.ema, (self.updates + 1) / (self.updates + 11))
        for average, weight in zip(self.average.parameters(), self.parameters, strict=True):
            average.lerp_(weight, 1 - keep)

    def state(self) -> dict[str, Any]:
        """All that :meth:`load` needs to go on as if nothing had been."""
        return {
            "drafter": self.drafter.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.drafter.load_state_dict(state["drafter"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


def _optimizer(drafter: Drafter, settings: TrainSettings) -> torch.optim.Optimizer:
    matrices = [p for p in drafter.parameters() if p.ndim > 1]
    vectors = [p for p in drafter.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=True,
    )
