"""The trainer: small updates, several passes, a falling rate, averaged weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.errors import AuroraError
from aurora_sgl.training import objectives
from aurora_sgl.training.replay import replay
from aurora_sgl.training.sequence import Sequence
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.statistics import accept_length
from aurora_sgl.training.unroll import TargetRows, unroll

Progress = Callable[[dict[str, Any]], None]


class Sequences(Protocol):
    """Requests to train on, loaded one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sequence: ...


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
) -> TrainResult:
    """Train a copy of ``drafter``; the given one stays as it is.

    Raises ``AuroraError`` when there is nothing to train on or the loss stops being finite.
    """
    if not len(sequences):
        raise AuroraError("no requests to train on")
    torch.manual_seed(settings.seed)
    device = device_of(settings)
    head = head.to(device)
    run = _Run(copy.deepcopy(drafter).float().to(device), sequences, head, settings)
    stopping = _EarlyStop(dev, head, settings) if dev is not None and len(dev) else None
    for number in range(settings.passes):
        for loss in run.one_pass():
            if progress is not None:
                progress(run.report(number, loss))
        if run.out_of_time() or (stopping is not None and stopping.after_pass(run.average)):
            break
    best = stopping.best if stopping is not None and stopping.best is not None else run.average
    result = TrainResult(best.cpu(), run.updates, run.tokens, run.metrics())
    if stopping is not None:
        result.metrics["dev_accept_length"] = stopping.history
    return result


class _Run:
    def __init__(
        self, drafter: Drafter, sequences: Sequences, head: TargetHead, settings: TrainSettings
    ) -> None:
        self.drafter = drafter.train().requires_grad_(True)
        self.average = copy.deepcopy(drafter).requires_grad_(False).eval()
        self.sequences, self.head, self.settings = sequences, head, settings
        self.objective = objectives.make(settings.objective, step_decay=settings.step_decay)
        self.target = TargetRows(drafter, head)
        self.optimizer = _optimizer(drafter, settings)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.best_tokens: dict[int, torch.Tensor] = {}
        self.total = settings.passes * len(sequences)
        self.updates = self.tokens = self.unreadable = 0
        self.started = time.monotonic()
        self.losses: list[float] = []
        self.device = drafter.device

    def one_pass(self) -> Iterator[float]:
        why = "too short"
        for index in torch.randperm(len(self.sequences), generator=self.generator).tolist():
            if self.out_of_time():
                return
            try:
                sequence = self.sequences[index]
            except AuroraError as error:  # its file went or broke since the window was chosen
                self.unreadable += 1
                why = str(error)
                continue
            yield self._update(index, sequence)
        if not self.updates:
            raise AuroraError(f"none of the requests could be trained on ({why})")

    def _update(self, index: int, sequence: Sequence) -> float:
        settings, sequence = self.settings, sequence.to(self.device)
        first, last = self._rows(sequence)
        if last - first < 1:
            return float("nan")
        if index not in self.best_tokens:
            self.best_tokens[index] = self.target.best_tokens(sequence)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.autocast):
            logits = unroll(
                self.drafter,
                sequence,
                self.head,
                first_row=first,
                last_row=last,
                steps=settings.steps,
            )
        weight = torch.ones(last - first, device=self.device)
        weight[: max(0, sequence.output_start - 1 - first)] = settings.prompt_weight
        steps = self.target.steps(
            logits,
            sequence,
            self.best_tokens[index],
            first_row=first,
            weight=weight,
            needs_mass=self.objective.needs_mass,
        )
        loss = self.objective(steps)
        if not bool(torch.isfinite(loss)):
            raise AuroraError(f"the loss is not finite at update {self.updates}: training stopped")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * self._rate()
        self.optimizer.step()
        self.updates += 1
        self.tokens += len(steps[0].token)
        self._average()
        self.losses.append(loss.item())
        return self.losses[-1]

    def _rows(self, sequence: Sequence) -> tuple[int, int]:
        """Base rows to train: row b needs the target's distribution of position b + 1."""
        last = min(sequence.rows, len(sequence.last) - 1)
        first = 0 if self.settings.train_on_prompt else max(0, sequence.output_start - 1)
        return max(first, last - self.settings.max_rows), last

    def _done(self) -> float:
        share = self.updates / max(1, self.total)
        if self.settings.max_seconds:
            share = max(share, (time.monotonic() - self.started) / self.settings.max_seconds)
        return min(1.0, share)

    def out_of_time(self) -> bool:
        limit = self.settings.max_seconds
        return bool(limit) and time.monotonic() - self.started > limit

    def _rate(self) -> float:
        warmup = min(self.settings.warmup, self.total // 10)
        if self.updates < warmup:
            return (self.updates + 1) / (warmup + 1)
        low = self.settings.final_rate
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * self._done()))

    @torch.no_grad()
    def _average(self) -> None:
        """Average of the weights, corrected for its short memory in the first updates."""
        keep = min(self.settings.ema, self.updates / (self.updates + 10))
        for average, weight in zip(
            self.average.parameters(), self.drafter.parameters(), strict=True
        ):
            average.lerp_(weight, 1 - keep)

    def report(self, number: int, loss: float) -> dict[str, Any]:
        return {
            "event": "update",
            "pass": number + 1,
            "passes": self.settings.passes,
            "update": self.updates,
            "updates": self.total,
            "loss": loss,
            "tokens": self.tokens,
            "seconds": time.monotonic() - self.started,
        }

    def metrics(self) -> dict[str, Any]:
        seconds = max(1e-9, time.monotonic() - self.started)
        share = max(1, len(self.losses) // self.settings.passes)
        finite = [x for x in self.losses if math.isfinite(x)]
        return {
            "updates": self.updates,
            "trained_tokens": self.tokens,
            "unreadable": self.unreadable,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "loss_first_pass": _mean(finite[:share]),
            "loss_last_pass": _mean(finite[-share:]),
        }


class _EarlyStop:
    """Keeps the average with the best accept length on the dev split."""

    def __init__(self, dev: Sequences, head: TargetHead, settings: TrainSettings) -> None:
        self.dev, self.head, self.settings = dev, head, settings
        self.best: Drafter | None = None
        self.history: list[float] = []
        self.since = 0

    def after_pass(self, average: Drafter) -> bool:
        served = copy.deepcopy(average).to(served_dtype(self.settings))
        greedy = (s for s in _readable(self.dev) if s.greedy)
        value = accept_length(replay(served, greedy, self.settings.shape, self.head))
        better = not self.history or value > max(self.history)
        self.history.append(value)
        if better:
            self.best, self.since = copy.deepcopy(average), 0
        else:
            self.since += 1
        return bool(self.settings.patience) and self.since >= self.settings.patience


def device_of(settings: TrainSettings) -> torch.device:
    """Raises ``AuroraError`` when a GPU is asked for that is not there."""
    if settings.device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(settings.device)
    if device.type != "cuda":
        return device
    index = device.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise AuroraError(f"there is no GPU {settings.device} for training: use device=cpu")
    return torch.device("cuda", index)


def served_dtype(settings: TrainSettings) -> torch.dtype:
    """Raises ``AuroraError`` for a name that is not a floating-point dtype of a server."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if settings.served_dtype not in known:
        raise AuroraError(f"unknown dtype {settings.served_dtype}: use one of {', '.join(known)}")
    return known[settings.served_dtype]


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


def _readable(sequences: Sequences) -> Iterator[Sequence]:
    for index in range(len(sequences)):
        with suppress(AuroraError):
            yield sequences[index]


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
