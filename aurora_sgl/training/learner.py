"""One update: the losses of its requests, their gradient, a step, and the averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.errors import AuroraError
from aurora_sgl.sequences.sequence import Sequence, Sequences
from aurora_sgl.training.loss import BatchLoss
from aurora_sgl.training.optimizer import Optimizer
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
        self.loss_of = BatchLoss(drafter, head, settings)
        self.parameters = list(drafter.parameters())
        self.optimizer = Optimizer(drafter, settings)
        self.clipped = torch.zeros((), dtype=torch.int64, device=drafter.device)
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

        Each process of the team takes every ``size``-th request. Reads the device once. Raises
        ``AuroraError``, in all of them, when the loss is not finite.
        """
        self.optimizer.zero_grad()
        update = Update()
        requests = list(self._read(batch[self.team.rank :: self.team.size], update))
        sums: dict[str, torch.Tensor] = {}
        for pack in self.loss_of.packs(requests, done=done):
            pack.value.backward()  # type: ignore[no-untyped-call]
            update.positions += pack.positions
            for name, value in (("", pack.value.detach()), *pack.statistics.items()):
                number = torch.as_tensor(value, dtype=torch.float32, device=self.drafter.device)
                sums[name] = sums.get(name, 0.0) + number
        mine = _on_host(sums)
        whole = torch.tensor(
            [
                mine.pop("", 0.0),
                update.positions,
                update.unreadable,
                0.0 if self.team.rank else seconds,
            ],
            dtype=torch.float64,
        )
        self.team.add([whole])
        total, positions, unreadable, update.seconds = whole.tolist()
        update.positions, update.unreadable = int(positions), int(unreadable)
        if not math.isfinite(total):
            raise AuroraError(f"the loss is not finite at update {self.updates}: training stopped")
        update.statistics = {
            name: value / max(1, update.positions) for name, value in self.team.total(mine).items()
        }
        if update.positions:
            self._step(1.0 / update.positions, rate)
            update.loss = total / update.positions
        return update

    def _read(self, numbers: List[int], update: Update) -> Iterator[tuple[int, Sequence]]:
        for index in numbers:
            try:
                yield index, self.sequences[index].to(self.drafter.device)
            except AuroraError as error:  # its file went or broke since the window was chosen
                update.unreadable += 1
                update.why = str(error)

    def _step(self, scale: float, rate: float) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.team.add(gradients)
        torch._foreach_mul_(gradients, scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.clipped += norm > self.settings.clip
        self.optimizer.step(rate)
        self._average()
        self.updates += 1

    @torch.no_grad()
    def _average(self) -> None:
        """Average of the weights, corrected for its short memory in the first updates."""
        keep = min(self.settings.ema, (self.updates + 1) / (self.updates + 11))
        averages: list[torch.Tensor] = list(self.average.parameters())
        weights: list[torch.Tensor] = list(self.parameters)
        torch._foreach_lerp_(averages, weights, 1 - keep)

    @property
    def clip_share(self) -> float:
        """Share of the updates whose gradient was cut to ``clip``. Reads the device."""
        return float(self.clipped) / max(1, self.updates)

    def state(self) -> dict[str, Any]:
        """All that :meth:`load` needs to go on as if nothing had been."""
        reference = self.loss_of.reference
        return {
            "drafter": self.drafter.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state(),
            "reference": None if reference is None else reference.state_dict(),
            "updates": self.updates,
            "clipped": int(self.clipped),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.drafter.load_state_dict(state["drafter"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load(state["optimizer"])
        if state["reference"] is not None:
            self.loss_of.freeze_reference().load_state_dict(state["reference"])
        self.updates = state["updates"]
        self.clipped.fill_(state["clipped"])


def _on_host(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """All of them in one read."""
    if not sums:
        return {}
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
