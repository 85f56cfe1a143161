"""Exact replay: the accept length that a drafter would have had on a logged request.

For a greedy request the target's continuation is in the log, so what it would have accepted of
any proposal is known without running it. For a sampled one the same holds in distribution, under
SGLang's default rule (``target_sampling``): walking through a node's children it accepts each with
the target's own probability and otherwise draws from the rest, so the emitted token is a draw from
the target whatever was proposed, and is accepted if and only if it is among the children. A logged
answer is such a draw. Under ``rejection_sampling`` (min(1, p / q)) what is emitted depends on the
proposal: those requests are left out by ``splits.why_not_judged``.

The arithmetic is SGLang 0.5.21's (eagle_worker_v2.py ``draft_forward``, spec_utils.py
``select_top_k_tokens``, eagle_utils.py ``organize_draft_results``): candidates score the product of
softmax probabilities, each step keeps the best ``topk`` for the next, and the best ``nodes - 1`` of
all candidates go to the target. One quirk matters: the draft keys and values belong to a beam
*slot* and do not move when the slot gets another parent, so a drafted row sees the rows that its
slot held before.

Proposals are computed for all positions at once and then walked as the server would have: from
the first output token, on by ``accepted + 1``. A position is dropped from the computation as soon
as nothing that follows can change what is accepted there.

What lies behind the last logged token is unknown. A step whose accepted tokens reach the end of
the log before the draft's depth is *undetermined*: it is left out here, and :func:`determined`
leaves it out of a server's records, so that both sides count the same steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.device import device_of, served_dtype
from aurora_sgl.evaluation.settings import EvaluationSettings
from aurora_sgl.intervals import accept_length
from aurora_sgl.sequences.sequence import Sequence

_ROOTS_AT_ONCE = 256


@dataclass(frozen=True)
class Replayed:
    """What one request would have been accepted; sums over its determined verify steps."""

    request_id: int
    verify_steps: int
    accepted: int
    domain: str = "default"

    @property
    def accept_length(self) -> float:
        """See :func:`aurora_sgl.intervals.accept_length`."""
        return accept_length(self.accepted, self.verify_steps)


@dataclass(frozen=True)
class Proposal:
    """A draft without its root: ``tokens[i]`` is node i + 1, ``parents[i]`` its parent's number.

    Node 0 is the root (the bonus token). Nodes are numbered as SGLang and our records do.
    """

    tokens: list[int]
    parents: list[int]


def determined(root: int, accepted: int, length: int, depth: int) -> bool:
    """Whether a verify step from position ``root`` is known from a log of ``length`` tokens.

    ``root`` is the position of the bonus token that the draft starts from.
    """
    known = length - 1 - root
    return known >= 1 and (accepted < known or depth <= known)


@torch.inference_mode()
def replay(
    drafter: Drafter, sequences: Iterable[Sequence], shape: DraftShape, head: TargetHead
) -> list[Replayed]:
    """Replay requests in the drafter's own dtype (cast it to the served one first).

    Requests must be ones that ``splits.why_not_judged`` lets through; the caller picks them. One
    result a request, also where it has no determined step.
    """
    return [replay_one(drafter, sequence, shape, head) for sequence in sequences]


@torch.inference_mode()
def replay_one(
    drafter: Drafter, sequence: Sequence, shape: DraftShape, head: TargetHead
) -> Replayed:
    """See :func:`replay`."""
    sequence, head = sequence.to(drafter.device), head.to(drafter.device)
    length = len(sequence.tokens)
    first = sequence.output_start
    roots = torch.arange(first, min(length - 2, sequence.rows) + 1)
    accepted = accepted_at(drafter, sequence, roots, shape, head).tolist()
    steps = total = 0
    root = first
    while root - first < len(accepted):
        taken = accepted[root - first]
        if not determined(root, taken, length, shape.depth):
            break
        steps, total, root = steps + 1, total + taken, root + taken + 1
    return Replayed(sequence.request_id, steps, total, sequence.domain)


def replay_both(
    base: Drafter,
    candidate: Drafter,
    sequences: Iterable[Sequence],
    head: TargetHead,
    settings: EvaluationSettings,
) -> tuple[list[Replayed], list[Replayed]]:
    """Both over the same requests, in the served dtype and draft shape."""
    dtype = served_dtype(settings)
    old, new = (copy.deepcopy(d).to(device_of(settings), dtype).eval() for d in (base, candidate))
    head = head.to(device_of(settings))
    before: list[Replayed] = []
    after: list[Replayed] = []
    for sequence in sequences:
        before.append(replay_one(old, sequence, settings.shape, head))
        after.append(replay_one(new, sequence, settings.shape, head))
    return before, after


@torch.inference_mode()
def accepted_at(
    drafter: Drafter,
    sequence: Sequence,
    roots: torch.Tensor,  # [roots] int64 positions, each >= 1 and <= sequence.rows
    shape: DraftShape,
    head: TargetHead,
) -> torch.Tensor:  # [roots] int64
    """Accepted draft tokens of a verify step from each root, as far as the log reaches."""
    parts = [beam.accepted() for beam in _beams(drafter, sequence, roots, shape, head)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


@torch.inference_mode()
def proposals_at(
    drafter: Drafter,
    sequence: Sequence,
    roots: torch.Tensor,  # [roots] int64 positions, each >= 1 and <= sequence.rows
    shape: DraftShape,
    head: TargetHead,
) -> list[Proposal]:
    """The whole draft from each root, numbered as a server records it."""
    return [
        proposal
        for beam in _beams(drafter, sequence, roots, shape, head, whole=True)
        for proposal in beam.proposals()
    ]


def _beams(
    drafter: Drafter,
    sequence: Sequence,
    roots: torch.Tensor,
    shape: DraftShape,
    head: TargetHead,
    *,
    whole: bool = False,
) -> Iterator[_Beam]:
    sequence, head = sequence.to(drafter.device), head.to(drafter.device)
    roots = roots.to(drafter.device)
    rows = sequence.rows
    dtype = drafter.dtype
    embeds = head.embed(sequence.tokens[1 : rows + 1], dtype)
    mixed, residual = drafter.mix(embeds, drafter.start(sequence.features[:rows].to(dtype)))
    text = drafter.keys_values(mixed, torch.arange(rows, device=roots.device))
    for part in torch.split(roots, _ROOTS_AT_ONCE) if len(roots) else ():
        beam = _Beam(drafter, head, sequence.tokens, shape, text, part, whole)
        beam.run(mixed, residual)
        yield beam


class _Beam:
    """Drafts from many roots side by side. Rows of tensors are roots that are still open."""

    def __init__(
        self,
        drafter: Drafter,
        head: TargetHead,
        tokens: torch.Tensor,
        shape: DraftShape,
        text: tuple[torch.Tensor, torch.Tensor],
        roots: torch.Tensor,
        whole: bool,  # compute every candidate, also those that cannot change what is accepted
    ) -> None:
        self.drafter, self.head, self.shape, self.text = drafter, head, shape, text
        self.whole = whole
        self.lm_head = None if drafter.config.is_eagle3 else head.lm_head.to(drafter.dtype)
        self.target_ids = drafter.target_ids
        self.base = roots - 1
        device = self.device = roots.device
        ahead = roots[:, None] + 1 + torch.arange(shape.depth, device=device)
        known = ahead < len(tokens)
        self.wanted = torch.where(known, tokens[ahead.clamp(max=len(tokens) - 1)], -1)
        size = (len(roots), shape.candidates)
        self.scores = torch.full(size, -1.0, device=device)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        # Candidate index of the parent (-1: the root), and of the match at each depth (-1: none).
        self.parents = torch.full(size, -1, device=device)
        self.matched = torch.full((len(roots), shape.depth), -1, device=device)

    def run(self, mixed: torch.Tensor, residual: torch.Tensor) -> None:
        topk = self.shape.topk
        base = self.base
        read, state = self.drafter.rows(mixed[base], residual[base], base, self.text, base)
        prob, token = self._best(read)
        self.scores[:, :topk], self.tokens[:, :topk] = prob, token
        slot = _find(token == self.wanted[:, :1])  # beam slot on the continuation, or -1
        self.matched[:, 0] = slot
        open_ = torch.arange(len(base), device=self.device)
        beam = torch.arange(topk, device=self.device).expand(
            len(base), -1
        )  # candidate in each beam slot
        states = state[:, None].expand(-1, topk, -1)
        own: tuple[torch.Tensor, torch.Tensor] | None = None
        for depth in range(1, self.shape.depth):
            keep = self._undecided(open_, slot, prob)
            open_, prob, token, slot = open_[keep], prob[keep], token[keep], slot[keep]
            states, beam = states[keep], beam[keep]
            if not len(open_):
                break
            own = own if own is None else (own[0][keep], own[1][keep])
            read, state, own = self._row(self.base[open_] + depth, token, states, own)
            step_prob, step_token = (_slots(x, topk) for x in self._best(read))
            expanded = (prob[..., None] * step_prob).flatten(1)
            begin = topk + (depth - 1) * topk**2
            here = slice(begin, begin + topk**2)
            self.scores[open_, here] = expanded
            self.tokens[open_, here] = step_token.flatten(1)
            self.parents[open_, here] = beam.repeat_interleave(topk, dim=1)
            found = self._match(open_, depth, slot, step_token)
            self.matched[open_, depth] = torch.where(found >= 0, begin + found, -1)
            prob, picked = expanded.topk(topk, dim=-1)
            token = step_token.flatten(1).gather(1, picked)
            beam = begin + picked
            slot = _find((picked == found[:, None]) & (found >= 0)[:, None])
            parents = (picked // topk)[..., None].expand(-1, -1, state.shape[-1])
            states = _slots(state, topk).gather(1, parents)

    def accepted(self) -> torch.Tensor:  # [roots]
        chosen = self._chosen()
        picked = torch.zeros_like(self.scores, dtype=torch.bool).scatter_(1, chosen, True)
        kept = picked.gather(1, self.matched.clamp(min=0)) & (self.matched >= 0)
        return kept.long().cumprod(-1).sum(-1)

    def proposals(self) -> list[Proposal]:
        assert self.whole
        found = []
        all_tokens, all_parents = self.tokens.cpu(), self.parents.cpu()
        for row, chosen in enumerate(self._chosen().sort(-1).values.tolist()):
            node_of = {candidate: number for number, candidate in enumerate(chosen, start=1)}
            parents = all_parents[row, chosen].tolist()
            found.append(
                Proposal(
                    tokens=all_tokens[row, chosen].tolist(),
                    parents=[node_of.get(parent, 0) for parent in parents],
                )
            )
        return found

    def _chosen(self) -> torch.Tensor:  # [roots, nodes - 1] candidates
        return self.scores.topk(self.shape.nodes - 1, dim=-1).indices

    def _row(
        self,
        positions: torch.Tensor,  # [open]
        token: torch.Tensor,  # [open, topk]
        states: torch.Tensor,  # [open, topk, H]
        own: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """One drafted row in every beam slot. Keys and values stay with the slot, as served."""
        topk = self.shape.topk
        at = positions.repeat_interleave(topk)
        embeds = self.head.embed(token.flatten(), self.drafter.dtype)
        mixed, residual = self.drafter.mix(embeds, states.flatten(0, 1))
        new = self.drafter.keys_values(mixed, at)
        shaped = tuple(_slots(x, topk)[:, :, None] for x in new)
        if own is None:
            key, value = shaped
        else:
            key, value = (torch.cat(pair, 2) for pair in zip(own, shaped, strict=True))
        depth = key.shape[2]
        read, state = self.drafter.rows(
            mixed, residual, at, self.text, at - depth, (key.flatten(0, 1), value.flatten(0, 1))
        )
        return read, state, (key, value)

    def _best(self, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # [rows, topk]
        logits = self.drafter.logits(read, self.lm_head)
        if self.shape.topk == 1:
            best = logits.argmax(-1, keepdim=True)
            return torch.ones_like(best, dtype=torch.float32), self.target_ids[best]
        prob, index = logits.softmax(-1).topk(self.shape.topk, dim=-1)
        return prob, self.target_ids[index]

    def _match(
        self, open_: torch.Tensor, depth: int, slot: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:  # [open] index within topk * topk, or -1
        parent = slot.clamp(min=0)
        children = token[torch.arange(len(open_), device=self.device), parent]
        child = _find(children == self.wanted[open_, depth, None])
        return torch.where((slot >= 0) & (child >= 0), parent * self.shape.topk + child, -1)

    def _undecided(
        self, open_: torch.Tensor, slot: torch.Tensor, prob: torch.Tensor
    ) -> torch.Tensor:
        """Open roots whose accepted count later candidates can still change.

        Either the continuation is still in the beam, or a beam slot outscores the deepest match:
        its children may then push that match out of the chosen nodes.
        """
        if self.whole:
            return torch.ones(len(open_), dtype=torch.bool, device=self.device)
        matched = self.matched[open_]
        count = (matched >= 0).sum(-1)
        deepest = matched.gather(1, (count - 1).clamp(min=0)[:, None])
        score = self.scores[open_].gather(1, deepest.clamp(min=0))
        threatened = (count > 0) & (prob > score).any(-1)
        return (slot >= 0) | threatened


def _find(hit: torch.Tensor) -> torch.Tensor:  # [rows, n] bool -> [rows] first index, or -1
    return torch.where(hit.any(-1), hit.int().argmax(-1), -1)


def _slots(x: torch.Tensor, topk: int) -> torch.Tensor:  # [roots * topk, ...] -> [roots, topk, ...]
    return x.reshape(-1, topk, *x.shape[1:])
