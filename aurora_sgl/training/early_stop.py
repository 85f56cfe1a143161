"""The average that was best on the dev split, by accept length and never by loss."""

from __future__ import annotations

import copy
from typing import Any

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.device import as_served
from aurora_sgl.evaluation.replay import replay
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.sequences.sequence import Sequences, readable
from aurora_sgl.training.settings import TrainSettings


class EarlyStop:
    """Replays the dev requests after every pass, as they would be served."""

    def __init__(self, dev: Sequences, head: TargetHead, settings: TrainSettings) -> None:
        self.dev, self.head, self.settings = dev, head, settings
        self.best: Drafter | None = None
        self.history: list[float] = []
        self.since = 0

    def replayed(self, drafter: Drafter) -> float:
        """Accept length on the dev split; nan without a request there that can be read."""
        served = as_served(drafter, self.settings)
        return AcceptCounts.of(
            replay(served, readable(self.dev), self.settings.shape, self.head)
        ).accept_length

    def after_pass(self, average: Drafter) -> bool:
        """Whether the run should end: ``patience`` passes have brought nothing better."""
        value = self.replayed(average)
        better = not self.history or value > max(self.history)
        self.history.append(value)
        if better:
            self.best, self.since = copy.deepcopy(average), 0
        else:
            self.since += 1
        return bool(self.settings.patience) and self.since >= self.settings.patience

    def state(self) -> dict[str, Any]:
        best = None if self.best is None else self.best.state_dict()
        return {"best": best, "history": self.history, "since": self.since}

    def load(self, state: dict[str, Any], like: Drafter) -> None:
        """Take up :meth:`state`; ``like`` is a drafter of the same shape."""
        self.history, self.since = list(state["history"]), state["since"]
        if state["best"] is not None:
            self.best = copy.deepcopy(like)
            self.best.load_state_dict(state["best"])
