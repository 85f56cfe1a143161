"""From the requests of an update to their loss: unroll the drafter over all of them at once, pair
it with the target, ask the objective."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, replace

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.packed import DraftedRows, Keep, PackedText
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training import objectives
from aurora_sgl.training.objectives import Loss, LossContext, UnrolledStep
from aurora_sgl.training.precision import can_autocast
from aurora_sgl.training.proposals import logged_step, logged_tokens
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.target_rows import RequestPart, TargetRows


@dataclass(frozen=True)
class PackLoss:
    """``value`` is a scalar with a gradient: the sum over requests of each one's loss times its
    positions. ``statistics`` are sums over positions too."""

    value: torch.Tensor
    positions: int  # rows of the first step
    statistics: Mapping[str, torch.Tensor | float]


class BatchLoss:
    """Losses of requests for one drafter. Keeps the target's best tokens between passes."""

    def __init__(self, drafter: Drafter, head: TargetHead, settings: TrainSettings) -> None:
        self.drafter, self.head, self.settings = drafter, head, settings
        self.objective = objectives.make(settings)
        half = can_autocast(settings, drafter.device)
        self.target = TargetRows(drafter, head, torch.bfloat16 if half else drafter.dtype)
        self.best: dict[int, torch.Tensor] = {}
        #: The drafter as it was when the objective first asked for one.
        self.reference: Drafter | None = None

    def packs(
        self,
        batch: List[tuple[int, Sequence]],  # requests with their numbers, on the drafter's device
        *,
        done: float = 0.0,
    ) -> Iterator[PackLoss]:
        """The loss as a sum of parts, for one backward each.

        Requests share a program as long as what is as wide as the draft vocabulary stays within
        ``piece_bytes``; one with more rows than that is taken in parts, each of which computes the
        keys and values of the text anew (sampled roll-outs then differ). ``done`` is the share of
        the run that lies behind. Requests that are too short have no part in it.
        """
        pack: list[RequestPart] = []
        for part in self._parts(batch):
            held = sum(one.end - one.begin for one in pack)
            if pack and held + part.end - part.begin > self.rows_at_once:
                yield self._loss(pack, done)
                pack = []
            pack.append(part)
        if pack:
            yield self._loss(pack, done)

    @property
    def rows_at_once(self) -> int:
        """Rows whose logits of one step fill ``piece_bytes`` in float32."""
        return max(8, self.settings.piece_bytes // (4 * self.drafter.config.draft_vocab_size))

    def rows(self, sequence: Sequence) -> tuple[int, int]:
        """Base rows to train: row b needs the log's token and the target at position b + 1."""
        last = min(sequence.rows, len(sequence.last) - 1, len(sequence.tokens) - 2)
        first = 0 if self.settings.train_on_prompt else max(0, sequence.output_start - 1)
        return max(first, sequence.train_from, last - self.settings.max_rows), last

    def _parts(self, batch: List[tuple[int, Sequence]]) -> Iterator[RequestPart]:
        for index, sequence in batch:
            first, last = self.rows(sequence)
            if last <= first:
                continue
            if index not in self.best:
                self.best[index] = self.target.best_tokens(sequence, first)
            for begin in range(first, last, self.rows_at_once):
                end = min(begin + self.rows_at_once, last)
                yield RequestPart(index, sequence, self.best[index], first, last, begin, end)

    def _loss(self, parts: list[RequestPart], done: float) -> PackLoss:
        objective, count = self.objective, self.settings.steps
        device = self.drafter.device
        weight = torch.cat([self._weight(part) for part in parts]).to(device)
        target = self.target.of(parts, weight, steps=count, needs_mass=objective.needs_mass)
        text = PackedText.of(
            [(part.sequence.tokens[: len(part.best)], part.sequence.features) for part in parts],
            [(part.begin, part.end) for part in parts],
        )
        kept: list[torch.Tensor] = []

        def keep(step: int, drafted: DraftedRows) -> torch.Tensor:
            kept.append(target.is_reached(step, drafted, objective.reach))
            return kept[-1]

        drafted = self._unroll(self.drafter, text, keep if objective.reach else None)
        reference = self._referenced(text, kept, done)
        steps = [
            target.step(k, one, reference[k] if reference else None)
            for k, one in enumerate(drafted)
        ]
        if not objective.needs_proposals:
            loss = objective(steps, LossContext(done, parts[0].key))
            return _summed([(loss, len(steps[0].token))])
        losses = []
        for number, part in enumerate(parts):
            counts = [one.base.counts for one in drafted]
            own = self._of_request(steps, counts, number, part)
            losses.append((objective(own, LossContext(done, part.key)), len(own[0].token)))
        return _summed(losses)

    def _referenced(
        self, text: PackedText, kept: list[torch.Tensor], done: float
    ) -> list[DraftedRows]:
        if done < self.objective.reference_from:
            return []
        reference = self.reference or self.freeze_reference()
        with torch.no_grad():
            same = (lambda step, _: kept[step]) if kept else None
            return self._unroll(reference, text, same)

    def freeze_reference(self) -> Drafter:
        self.reference = copy.deepcopy(self.drafter).requires_grad_(False).eval()
        return self.reference

    def _of_request(
        self, steps: list[UnrolledStep], counts: list[list[int]], number: int, part: RequestPart
    ) -> list[UnrolledStep]:
        """The steps of one request of a pack, with what servers proposed for it."""
        logged = logged_tokens(part.sequence, part.begin, self.target.draft_of_on_host)
        own = []
        for k, step in enumerate(steps):
            begin, rows = sum(counts[k][:number]), counts[k][number]
            if not rows:
                break
            mine = {
                name: value[begin : begin + rows]
                for name, value in vars(step).items()
                if isinstance(value, torch.Tensor) and name != "parent"
            }
            mine["weight"] = mine["weight"] * (rows / len(step.token))
            proposed = logged_step(logged.get(k, ()), rows, step.token.device)
            own.append(replace(step, **mine, logged=proposed, parent=None))
        return own

    def _weight(self, part: RequestPart) -> torch.Tensor:  # [rows of the part]
        sequence = part.sequence
        weight = torch.ones(part.end - part.begin)
        prompt = max(0, sequence.output_start - 1 - part.begin)
        weight[:prompt] = self.settings.prompt_weight
        if sequence.weights is None:
            return weight
        return weight * sequence.weights[part.begin : part.end]

    def _unroll(self, drafter: Drafter, text: PackedText, keep: Keep | None) -> list[DraftedRows]:
        device = drafter.device
        enabled = can_autocast(self.settings, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            return drafter.unroll(
                text, self.head, steps=self.settings.steps, keep=keep, dtype=drafter.dtype
            )


def _summed(losses: list[tuple[Loss, int]]) -> PackLoss:
    """Losses whose weights make them sums already, and their statistics over so many rows each."""
    sums: dict[str, torch.Tensor | float] = {}
    for loss, rows in losses:
        for name, value in loss.statistics.items():
            sums[name] = sums.get(name, 0.0) + rows * value
    value = torch.stack([loss.value for loss, _ in losses]).sum()
    return PackLoss(value, sum(rows for _, rows in losses), sums)
