"""From a request to its loss: unroll the drafter, pair it with the target, ask the objective."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training import objectives
from aurora_sgl.training.objectives import Loss, LossContext, UnrolledStep
from aurora_sgl.training.precision import can_autocast
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.target_rows import TargetRows

#: Weight of each base row ``first .. last - 1`` of a request.
WeightOf = Callable[[Sequence, int, int], torch.Tensor]


@dataclass(frozen=True)
class SequenceLossResult:
    """``value`` is a scalar with a gradient; ``positions`` counts the rows of the first step."""

    value: torch.Tensor
    positions: int
    statistics: dict[str, float]


class SequenceLoss:
    """Losses of requests for one drafter. Keeps the target's best tokens between passes."""

    def __init__(self, drafter: Drafter, head: TargetHead, settings: TrainSettings) -> None:
        self.drafter, self.head, self.settings = drafter, head, settings
        self.objective = objectives.make(settings)
        self.target = TargetRows(drafter, head)
        self.best: dict[int, torch.Tensor] = {}
        self.reference: Drafter | None = None
        if self.objective.needs_reference:
            self.reference = copy.deepcopy(drafter).requires_grad_(False).eval()

    def __call__(
        self,
        index: int,
        sequence: Sequence,
        *,
        done: float = 0.0,
        weight_of: WeightOf | None = None,
    ) -> SequenceLossResult | None:
        """The loss of the request that is number ``index`` in every pass; None: it is too short.

        ``done`` is the share of the run that lies behind. The sequence must be on the drafter's
        device.
        """
        first, last = self.rows(sequence)
        if last - first < 1:
            return None
        loss, steps = self._loss(index, index, sequence, first, last, done, weight_of, None)
        return SequenceLossResult(loss.value, len(steps[0].token), loss.statistics)

    def pieces(
        self,
        index: int,
        sequence: Sequence,
        *,
        done: float = 0.0,
        weight_of: WeightOf | None = None,
    ) -> Iterator[SequenceLossResult]:
        """The same loss as a sum of parts, for one backward each: what is as wide as the draft
        vocabulary then exists for ``piece_bytes`` of rows at a time, however long the request.

        Each part computes the keys and values of the text anew. Sampled roll-outs differ.
        """
        first, last = self.rows(sequence)
        size = self.rows_at_once
        if last - first <= size:
            whole = self(index, sequence, done=done, weight_of=weight_of)
            if whole is not None:
                yield whole
            return
        for number, begin in enumerate(range(first, last, size)):
            end, key = min(begin + size, last), (index << 16) + number
            loss, steps = self._loss(
                index, key, sequence, begin, end, done, weight_of, (first, last)
            )
            count = len(steps[0].token)
            share = count / _rows(0, sequence, len(self.best[index]), first, last)
            yield SequenceLossResult(loss.value * share, count, loss.statistics)

    @property
    def rows_at_once(self) -> int:
        """Rows whose logits of one step fill ``piece_bytes`` in float32."""
        return max(8, self.settings.piece_bytes // (4 * self.drafter.config.draft_vocab_size))

    def _loss(
        self,
        index: int,
        key: int,
        sequence: Sequence,
        first: int,
        last: int,
        done: float,
        weight_of: WeightOf | None,
        whole: tuple[int, int] | None,  # the rows of which these are a part
    ) -> tuple[Loss, list[UnrolledStep]]:
        if index not in self.best:
            self.best[index] = self.target.best_tokens(sequence)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self._unroll(self.reference, sequence, first, last)
        weigh = weight_of or self._weight
        steps = self.target.steps(
            self._unroll(self.drafter, sequence, first, last),
            sequence,
            self.best[index],
            first_row=first,
            weight=weigh(sequence, first, last).to(self.drafter.device),
            needs_mass=self.objective.needs_mass,
            needs_proposals=self.objective.needs_proposals,
            reference=reference,
        )
        if whole is not None:
            steps = _as_part(steps, sequence, len(self.best[index]), first, whole)
        return self.objective(steps, LossContext(done, key)), steps

    def rows(self, sequence: Sequence) -> tuple[int, int]:
        """Base rows to train: row b needs the target's distribution of position b + 1."""
        last = min(sequence.rows, len(sequence.last) - 1)
        first = 0 if self.settings.train_on_prompt else max(0, sequence.output_start - 1)
        return max(first, last - self.settings.max_rows), last

    def _weight(self, sequence: Sequence, first: int, last: int) -> torch.Tensor:
        weight = torch.ones(last - first)
        weight[: max(0, sequence.output_start - 1 - first)] = self.settings.prompt_weight
        return weight if sequence.weights is None else weight * sequence.weights[first:last]

    def _unroll(
        self, drafter: Drafter, sequence: Sequence, first: int, last: int
    ) -> list[torch.Tensor]:
        device = drafter.device
        enabled = can_autocast(self.settings, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            return drafter.unroll(
                sequence.tokens,
                sequence.features,
                self.head,
                first_row=first,
                last_row=last,
                steps=self.settings.steps,
            )


def _as_part(
    steps: list[UnrolledStep], sequence: Sequence, logged: int, first: int, whole: tuple[int, int]
) -> list[UnrolledStep]:
    """Weights with which the mean over a part's rows adds up to the mean over all rows.

    Deeper steps have fewer rows, and the last part lacks them all: with n_k of n rows in step k of
    the whole, and m_k of m in this part, the part counts m / n and its step k (m_k / n_k) n / m.
    """

    share = len(steps[0].token) / _rows(0, sequence, logged, *whole)
    return [
        replace(
            step,
            weight=step.weight * (len(step.token) / _rows(k, sequence, logged, *whole) / share),
        )
        for k, step in enumerate(steps)
    ]


def _rows(k: int, sequence: Sequence, logged: int, first: int, last: int) -> int:
    """Rows of step k from base rows ``first .. last - 1``, as ``TargetRows.steps`` has them."""
    return min(last - first, logged - 1 - first - k)
