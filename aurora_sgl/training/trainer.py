"""The trainer: small updates, several passes, a rate schedule, averaged weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.errors import AuroraError
from aurora_sgl.evaluation.device import device_of
from aurora_sgl.intervals import or_none
from aurora_sgl.sequences.sequence import Sequences
from aurora_sgl.training.batches import batches
from aurora_sgl.training.early_stop import EarlyStop
from aurora_sgl.training.learner import Learner, Update
from aurora_sgl.training.resume import Checkpoints
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.team import Team

#: Of each weight a checkpoint has the weight, its average and AdamW's two moments, in float32.
_COPIES = 4

#: Points of a curve that a run which goes on from a checkpoint tells of what came before.
_POINTS = 200

#: Called after every update; may block (to give way to serving): that time does not count.
Progress = Callable[[dict[str, Any]], None]


@dataclass
class TrainResult:
    """What came out: the averaged drafter (float32) and what to log of the run."""

    drafter: Drafter
    updates: int = 0
    tokens: int = 0  # positions that counted in step 0, over all passes
    metrics: dict[str, Any] = field(default_factory=dict)


def train(
    drafter: Drafter,
    sequences: Sequences,
    head: TargetHead,
    settings: TrainSettings,
    *,
    dev: Sequences | None = None,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    team: Team | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainResult:
    """Train a copy of ``drafter``; the given one stays as it is.

    ``checkpoints``, already begun with the plan of this run, makes it go on where it was killed.
    Every process of a ``team`` calls this with the same arguments and gets the same result; only
    process 0 replays ``dev``, writes checkpoints and reports progress. ``clock`` is what
    ``max_seconds`` is counted by, in seconds (``time.process_time``: the processor's, for a
    comparison on a busy machine). Raises ``AuroraError`` when there is nothing to train on or the
    loss stops being finite.
    """
    if not len(sequences):
        raise AuroraError("no requests to train on")
    torch.manual_seed(settings.seed)
    device, team = device_of(settings), team or Team()
    head = head.to(device)
    learner = Learner(copy.deepcopy(drafter).float().to(device), sequences, head, settings, team)
    stopping = EarlyStop(dev, head, settings) if dev is not None and len(dev) else None
    run = _RunState(learner, stopping, checkpoints, progress, clock)
    run.take_up()
    while run.number < len(run.plan) and not run.over:
        run.one_pass()
    best = stopping.best if stopping is not None and stopping.best is not None else learner.average
    return TrainResult(best.cpu(), learner.updates, run.tokens, run.metrics())


class _RunState:
    """How far a run came: all but the weights."""

    def __init__(
        self,
        learner: Learner,
        stopping: EarlyStop | None,
        checkpoints: Checkpoints | None,
        progress: Progress | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now = clock
        self.learner, self.settings, self.team = learner, learner.settings, learner.team
        self.stopping, self.progress = stopping, progress
        self.checkpoints = checkpoints
        self.plan = self._passes()
        self.total = sum(map(len, self.plan))
        self.number = self.place = 0  # of the pass, and of the next update in it
        self.tokens = self.unreadable = self.updates_done = self.resumed_at = 0
        self.seconds = self.before = 0.0  # as process 0 has them; spent before a kill
        self.why = "too short"
        self.over = False
        self.losses: list[float] = []
        self.statistics: dict[str, list[float]] = {}  # of the objective, one value an update
        self.started = self.now()

    def one_pass(self) -> None:
        updates = self.plan[self.number]
        while self.place < len(updates):
            if self._is_out_of_time():
                self.over = True
                return
            self._note(
                self.learner.update(
                    updates[self.place], rate=self._rate(), done=self._done(), seconds=self._clock()
                )
            )
            self.place += 1
            self._report()
            self._save(always=False)
        if not self.learner.updates:
            raise AuroraError(f"none of the requests could be trained on ({self.why})")
        self.number, self.place = self.number + 1, 0
        if self.stopping is not None:
            chief = self.team.rank == 0
            stop = self.stopping.after_pass(self.learner.average) if chief else None
            self.over = bool(self.team.share(stop))
            self._tell("pass", dev_accept_length=self._lengths())
            self._save(always=True)

    def take_up(self) -> None:
        """Go on from the last checkpoint, if there is one of this very run."""
        if self.checkpoints is not None:
            weights = sum(p.numel() for p in self.learner.drafter.parameters())
            self.checkpoints.expect(_COPIES * 4 * weights)
        own = None
        if self.checkpoints is not None and self.team.rank == 0:
            own = self.checkpoints.load()
        state = self.team.share(own)
        if state is None or state["requests"] != len(self.learner.sequences):
            return
        self.learner.load(state["learner"])
        for name, value in state["run"].items():
            setattr(self, name, value)
        self.before, self.resumed_at = self.seconds, self.learner.updates
        if self.stopping is not None and state["stopping"] is not None:
            self.stopping.load(state["stopping"], self.learner.average)
        self._tell(
            "resumed",
            loss=_curve(self.losses, _POINTS),
            reward=_curve(self.statistics.get("reward_mean", []), _POINTS),
            dev_accept_length=self._lengths(),
        )

    def _save(self, *, always: bool) -> None:
        kept = self.checkpoints
        if kept is None or self.team.rank or not kept.seconds:
            return
        if not (kept.is_due or (always and kept.is_affordable)):
            return
        names = (
            "number", "place", "tokens", "unreadable", "updates_done", "seconds", "over", "losses",
            "statistics",
        )  # fmt: skip
        self.seconds = self._clock()
        kept.save(
            lambda: {
                "requests": len(self.learner.sequences),
                "learner": self.learner.state(),
                "stopping": self.stopping.state() if self.stopping is not None else None,
                "run": {name: getattr(self, name) for name in names},
            }
        )

    def _passes(self) -> list[list[list[int]]]:
        """The updates of each pass; a small window gets more passes, up to ``least_updates``."""
        passes = [self._batches(number) for number in range(self.settings.passes)]
        while sum(map(len, passes)) < self.settings.least_updates:
            passes.append(self._batches(len(passes)))
        return passes

    def _batches(self, number: int) -> list[list[int]]:
        sequences, settings = self.learner.sequences, self.settings
        return batches(
            len(sequences),
            seed=settings.seed,
            number=number,
            size=settings.batch_requests,
            tokens=settings.batch_tokens,
            length=lambda index: min(settings.max_rows, _length(sequences, index)),
        )

    def _note(self, update: Update) -> None:
        self.updates_done += 1
        self.seconds = update.seconds
        self.tokens += update.positions
        self.unreadable += update.unreadable
        self.why = update.why or self.why
        self.losses.append(update.loss)
        for name, value in update.statistics.items():
            self.statistics.setdefault(name, []).append(value)

    def _clock(self) -> float:
        return self.before + self.now() - self.started

    def _done(self) -> float:
        share = self.updates_done / max(1, self.total)
        if self.settings.max_seconds:
            share = max(share, self.seconds / self.settings.max_seconds)
        return min(1.0, share)

    def _is_out_of_time(self) -> bool:
        limit = self.settings.max_seconds
        return bool(limit) and self.seconds > limit

    def _rate(self) -> float:
        """Share of the peak rate: up over the warm-up, then as ``schedule`` says."""
        settings = self.settings
        warmup = min(settings.warmup, self.total // 10)
        if self.learner.updates < warmup:
            return (self.learner.updates + 1) / (warmup + 1)
        if settings.schedule == "constant":
            return 1.0
        low = settings.final_rate
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * self._done()))

    def _report(self) -> None:
        rewards, limit = self.statistics.get("reward_mean"), self.settings.max_seconds
        self._tell(
            "update",
            loss=self.losses[-1],
            tokens=self.tokens,
            seconds=self.seconds,
            **({"reward": rewards[-1]} if rewards else {}),
            **({"seconds_allowed": max(0.0, limit - self.seconds)} if limit else {}),
        )

    def _tell(self, event: str, **more: Any) -> None:
        if self.progress is None or self.team.rank:
            return
        called = self.now()
        self.progress(
            {
                "event": event,
                "pass": min(self.number + 1, len(self.plan)),
                "passes": len(self.plan),
                "update": self.updates_done,
                "updates": self.total,
                **more,
            }
        )
        self.started += self.now() - called

    def _lengths(self) -> list[float | None]:
        """The accept lengths of the dev split so far, one a pass."""
        return [or_none(x) for x in self.stopping.history] if self.stopping is not None else []

    def metrics(self) -> dict[str, Any]:
        seconds = max(1e-9, self._clock())
        share = max(1, len(self.losses) // len(self.plan))
        finite = [x for x in self.losses if math.isfinite(x)]
        values: dict[str, Any] = {
            "updates": self.learner.updates,
            "trained_tokens": self.tokens,
            "unreadable": self.unreadable,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "loss_first_pass": _mean(finite[:share]),
            "loss_last_pass": _mean(finite[-share:]),
            "loss_curve": _curve(finite),
            "grad_clip_share": round(self.learner.clip_share, 4),
            **{f"{name}_last_pass": _mean(x[-share:]) for name, x in self.statistics.items()},
        }
        if "reward_mean" in self.statistics:
            values["reward_curve"] = _curve(self.statistics["reward_mean"])
        if self.resumed_at:
            values["resumed_at"] = self.resumed_at
        if self.checkpoints is not None and self.checkpoints.error:
            values["checkpoint_error"] = self.checkpoints.error
        if self.stopping is not None:
            values["dev_accept_length"] = self.stopping.history
        return values


def _length(sequences: Sequences, index: int) -> int:
    length_of = getattr(sequences, "length", None)
    return int(length_of(index)) if length_of is not None else sequences[index].rows


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _curve(values: list[float], points: int = 40) -> list[float | None]:
    """At most ``points`` means over runs of equal length: what a picture needs."""
    size = max(1, math.ceil(len(values) / points))
    return [_mean(values[begin : begin + size]) for begin in range(0, len(values), size)]
