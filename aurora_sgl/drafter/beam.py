"""SGLang's draft loop over one-layer drafters, for many roots of one text side by side.

The arithmetic is SGLang 0.5.21's (eagle_worker_v2.py ``draft_forward``, spec_utils.py
``select_top_k_tokens``, eagle_utils.py ``organize_draft_results``): candidates score the product of
softmax probabilities, each step keeps the best ``topk`` for the next, and the best ``nodes - 1`` of
all candidates go to the target. One quirk matters: the draft keys and values belong to a beam
*slot* and do not move when the slot gets another parent, so a drafted row sees the rows that its
slot held before.

Proposals are computed for all positions at once. Where only the accepted count is asked for, a
position is dropped from the computation as soon as nothing that follows can change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter.model import Draft
from aurora_sgl.drafter.target import TargetHead

_ROOTS_AT_ONCE = 256

Pair = tuple[torch.Tensor, torch.Tensor]


class Rows(Protocol):
    """What the loop asks of a drafter (``architectures.one_layer.OneLayerDrafter``)."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def target_ids(self) -> torch.Tensor: ...

    def shared_head(self, head: TargetHead) -> torch.Tensor | None: ...

    def start(self, features: torch.Tensor) -> torch.Tensor: ...

    def mix(self, embeds: torch.Tensor, hidden: torch.Tensor) -> Pair: ...

    def keys_values(self, mixed: torch.Tensor, positions: torch.Tensor) -> Pair: ...

    def rows(
        self,
        mixed: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        text: Pair,
        last_row: torch.Tensor,
        own: tuple[torch.Tensor, ...] | None = None,
    ) -> Pair: ...

    def logits(self, read: torch.Tensor, lm_head: torch.Tensor | None = None) -> torch.Tensor: ...


def beams(
    drafter: Rows,
    tokens: torch.Tensor,  # [T] int64
    features: torch.Tensor,  # [n, feature_width]
    roots: torch.Tensor,  # [roots] int64 positions, each >= 1 and <= n
    shape: DraftShape,
    head: TargetHead,
    *,
    whole: bool = False,
) -> Iterator[Beam]:
    """Drafts from the roots, ``_ROOTS_AT_ONCE`` at a time and in their order.

    ``whole``: every candidate is computed, also those that can't change what is accepted.
    """
    device = drafter.device
    tokens, features, head = tokens.to(device), features.to(device), head.to(device)
    roots = roots.to(device)
    rows = min(len(features), len(tokens) - 1)
    dtype = drafter.dtype
    embeds = head.embed(tokens[1 : rows + 1], dtype)
    mixed, residual = drafter.mix(embeds, drafter.start(features[:rows].to(dtype)))
    text = drafter.keys_values(mixed, torch.arange(rows, device=device))
    for part in torch.split(roots, _ROOTS_AT_ONCE) if len(roots) else ():
        beam = Beam(drafter, head, tokens, shape, text, part, whole)
        beam.run(mixed, residual)
        yield beam


class Beam:
    """Drafts from many roots side by side. Rows of tensors are roots that are still open."""

    def __init__(
        self,
        drafter: Rows,
        head: TargetHead,
        tokens: torch.Tensor,
        shape: DraftShape,
        text: Pair,
        roots: torch.Tensor,
        whole: bool,  # compute every candidate, also those that cannot change what is accepted
    ) -> None:
        self.drafter, self.head, self.shape, self.text = drafter, head, shape, text
        self.whole = whole
        lm_head = drafter.shared_head(head)
        self.lm_head = None if lm_head is None else lm_head.to(drafter.dtype)
        self.target_ids = drafter.target_ids
        self.base = roots - 1
        device = self.device = roots.device
        ahead = roots[:, None] + 1 + torch.arange(shape.depth, device=device)
        is_logged = ahead < len(tokens)
        self.wanted = torch.where(is_logged, tokens[ahead.clamp(max=len(tokens) - 1)], -1)
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
        own: Pair | None = None
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
            match = self._match(open_, depth, slot, step_token)
            self.matched[open_, depth] = torch.where(match >= 0, begin + match, -1)
            prob, picked = expanded.topk(topk, dim=-1)
            token = step_token.flatten(1).gather(1, picked)
            beam = begin + picked
            slot = _find((picked == match[:, None]) & (match >= 0)[:, None])
            parents = (picked // topk)[..., None].expand(-1, -1, state.shape[-1])
            states = _slots(state, topk).gather(1, parents)

    def accepted(self) -> torch.Tensor:  # [roots]
        chosen = self._chosen()
        picked = torch.zeros_like(self.scores, dtype=torch.bool).scatter_(1, chosen, True)
        kept = picked.gather(1, self.matched.clamp(min=0)) & (self.matched >= 0)
        return kept.long().cumprod(-1).sum(-1)

    def proposals(self) -> list[Draft]:
        assert self.whole
        drafts = []
        all_tokens, all_parents = self.tokens.cpu(), self.parents.cpu()
        for row, chosen in enumerate(self._chosen().sort(-1).values.tolist()):
            node_of = {candidate: number for number, candidate in enumerate(chosen, start=1)}
            parents = all_parents[row, chosen].tolist()
            drafts.append(
                Draft(
                    tokens=all_tokens[row, chosen].tolist(),
                    parents=[node_of.get(parent, 0) for parent in parents],
                )
            )
        return drafts

    def _chosen(self) -> torch.Tensor:  # [roots, nodes - 1] candidates
        return self.scores.topk(self.shape.nodes - 1, dim=-1).indices

    def _row(
        self,
        positions: torch.Tensor,  # [open]
        token: torch.Tensor,  # [open, topk]
        states: torch.Tensor,  # [open, topk, H]
        own: Pair | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Pair]:
        """One drafted row in every beam slot. Keys and values stay with the slot, as served."""
        topk = self.shape.topk
        places = positions.repeat_interleave(topk)
        embeds = self.head.embed(token.flatten(), self.drafter.dtype)
        mixed, residual = self.drafter.mix(embeds, states.flatten(0, 1))
        new = self.drafter.keys_values(mixed, places)
        shaped = tuple(_slots(x, topk)[:, :, None] for x in new)
        if own is None:
            key, value = shaped
        else:
            key, value = (torch.cat(pair, 2) for pair in zip(own, shaped, strict=True))
        depth = key.shape[2]
        read, state = self.drafter.rows(
            mixed,
            residual,
            places,
            self.text,
            places - depth,
            (key.flatten(0, 1), value.flatten(0, 1)),
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
