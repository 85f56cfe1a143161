"""The target's side of training: its distribution where the drafter's rows predict."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn import functional as F

from aurora_sgl.drafter import vocabulary
from aurora_sgl.drafter.attention.states import wide
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.packed import DraftedRows
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training.objectives.base import UnrolledStep, within_top


@dataclass(frozen=True)
class RequestPart:
    """Base rows ``begin .. end - 1`` of a request; all its parts have ``first .. last - 1``.

    Row b of step k predicts position b + 2 + k, for which the target speaks at b + 1 + k.
    """

    index: int  # of the request: the same in every pass
    sequence: Sequence
    best: torch.Tensor  # [n] from :meth:`TargetRows.best_tokens`
    first: int
    last: int
    begin: int
    end: int

    @property
    def key(self) -> int:
        whole = (self.begin, self.end) == (self.first, self.last)
        return self.index if whole else (self.index << 16) + 1 + self.begin - self.first

    def rows_of(self, step: int) -> int:
        """Base rows of the whole request that step ``step`` has, if all are computed."""
        return min(self.last, len(self.best) - 1 - step) - self.first


class TargetRows:
    """The target's distribution at the positions that a drafter predicts, over its vocabulary."""

    def __init__(
        self, drafter: Drafter, head: TargetHead, dtype: torch.dtype = torch.float32
    ) -> None:
        ids = drafter.target_ids
        self.head, self.dtype = head, dtype
        self.draft_of = vocabulary.inverse(ids, drafter.config.vocab_size)
        self.draft_of_on_host = self.draft_of.cpu()  # read token by token
        self.rows_of_head = head.lm_head[ids].to(dtype)  # [draft_vocab, H]

    def best_tokens(
        self, sequence: Sequence, first: int = 0
    ) -> torch.Tensor:  # [n] int64 target ids
        """The target's best token after each position from ``first`` on; read from the log where it
        is greedy and nothing but the target chose (under a grammar or a bias the log has what was
        allowed). Before ``first`` the log's own."""
        count = min(len(sequence.last), len(sequence.tokens) - 1)
        is_own = sequence.greedy and not sequence.constrained
        known_from = sequence.output_start - 1 if is_own else count
        best = sequence.tokens[1 : count + 1].clone()
        for begin in range(first, known_from, 256):
            end = min(begin + 256, known_from)
            best[begin:end] = (sequence.last[begin:end].float() @ self.head.wide_lm_head.T).argmax(
                -1
            )
        return best

    def of(
        self,
        parts: List[RequestPart],
        weight: torch.Tensor,  # [base rows] float32
        *,
        steps: int,
        needs_mass: bool,
    ) -> TargetPack:
        """The target at all positions that these parts need, request by request."""
        device = self.rows_of_head.device
        spans = [(p.begin + 1, min(len(p.best), p.end + steps)) for p in parts]
        last = torch.cat([p.sequence.last[a:b] for p, (a, b) in zip(parts, spans, strict=True)])
        scores = wide(last.to(self.dtype) @ self.rows_of_head.T)
        best = torch.cat([p.best[a:b] for p, (a, b) in zip(parts, spans, strict=True)])
        after = torch.cat(
            [p.sequence.tokens[a + 1 : b + 1] for p, (a, b) in zip(parts, spans, strict=True)]
        )
        counts = torch.tensor([p.end - p.begin for p in parts])
        places = [
            offset + torch.arange(p.end - p.begin)
            for p, offset in zip(parts, (0, *accumulate(b - a for a, b in spans)), strict=False)
        ]
        ratio = torch.tensor(
            [[p.rows_of(0) / max(1, p.rows_of(k)) for k in range(steps)] for p in parts],
            dtype=scores.dtype,
        )
        sampled = torch.tensor([not p.sequence.greedy for p in parts])
        request = torch.repeat_interleave(counts)
        return TargetPack(
            log_p=scores.log_softmax(-1),
            mass=self._mass(last.float(), scores) if needs_mass else None,
            token=self.draft_of[best],
            after=self.draft_of[after],
            follows=best == after,
            place=torch.cat(places).to(device),
            weight=weight.to(scores.dtype)[:, None] * ratio[request].to(device),
            sampled=sampled[request].to(device),
        )

    def _mass(self, last: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        whole = torch.cat(
            [(part @ self.head.wide_lm_head.T).logsumexp(-1) for part in torch.split(last, 256)]
        )
        return (scores.logsumexp(-1) - whole).exp()


@dataclass(frozen=True)
class TargetPack:
    """What the target says at the positions of some parts, one behind the other [positions].

    Base row j finds its own position for step k at ``place[j] + k``.
    """

    log_p: torch.Tensor  # [positions, draft_vocab] float32
    mass: torch.Tensor | None  # [positions]
    token: torch.Tensor  # [positions] int64: draft id of the target's best token, or -1
    after: torch.Tensor  # [positions] int64: draft id of the log's token, or -1
    follows: torch.Tensor  # [positions] bool
    place: torch.Tensor  # [base rows] int64
    #: [base rows, steps] float32: with these the sum over the rows of a step, over all parts and
    #: requests, is each request's mean over its rows times their number in the first step.
    weight: torch.Tensor
    sampled: torch.Tensor  # [base rows] bool

    def is_reached(self, step: int, drafted: DraftedRows, topk: int) -> torch.Tensor:
        """Rows whose next token of the log is among the drafter's ``topk`` best. [rows] bool"""
        place = self._place(step, drafted)
        return within_top(drafted.logits.detach(), self.after[place], topk)

    def step(
        self, number: int, drafted: DraftedRows, reference: DraftedRows | None
    ) -> UnrolledStep:
        """The drafter's rows of a step with the target's. Their weights are such that a mean over
        these rows is the sum that ``weight`` speaks of."""
        place = self._place(number, drafted)
        rows = drafted.base.number.to(place.device)
        return UnrolledStep(
            log_q=F.log_softmax(drafted.logits, -1),
            log_p=self.log_p[place],
            mass=None if self.mass is None else self.mass[place],
            token=self.token[place],
            weight=self.weight[rows, number] * len(rows),
            follows=self.follows[place],
            log_r=None if reference is None else F.log_softmax(reference.logits, -1),
            after=self.after[place],
            sampled=self.sampled[rows],
            parent=drafted.parent,
        )

    def _place(self, step: int, drafted: DraftedRows) -> torch.Tensor:
        return self.place[drafted.base.number.to(self.place.device)] + step
