"""What a server proposed for a request, and what became of it: the log that RL learns from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training.objectives.base import LoggedTokens


@dataclass(frozen=True)
class LoggedToken:
    """One proposed token after the accepted part of a draft."""

    row: int  # of the base rows, counted from the first one
    token: int  # draft id
    reward: float  # drafts accepted from here on
    group: int  # number of the draft and depth: siblings share it


def logged_tokens(
    sequence: Sequence,
    first_row: int,
    draft_of: torch.Tensor,  # [vocab] draft id of each target id, on cpu
) -> Mapping[int, list[LoggedToken]]:
    """Siblings along the accepted path of each logged draft, by depth (0: the root's children).

    What a draft holds below a rejected node was judged by nobody and is left out. A token of the
    draft vocabulary of then that has no draft id now is left out too.
    """
    by_depth: dict[int, list[LoggedToken]] = defaultdict(list)
    if not sequence.proposals:
        return by_depth
    tokens = sequence.tokens.tolist()
    for number, proposal in enumerate(sequence.proposals):
        row, node = proposal.root - 1 - first_row, 0
        if row < 0:
            continue
        for depth in range(len(proposal.tokens)):
            position = proposal.root + 1 + depth
            children = [i + 1 for i, parent in enumerate(proposal.parents) if parent == node]
            if not children or position >= len(tokens):
                break
            hit = 0
            for child in children:
                token = proposal.tokens[child - 1]
                matched = token == tokens[position] and depth < proposal.accepted
                hit = child if matched else hit
                draft = int(draft_of[token])
                reward = float(proposal.accepted - depth) if matched else 0.0
                if draft >= 0:
                    by_depth[depth].append(LoggedToken(row, draft, reward, number))
            if not hit:
                break
            node = hit
    return by_depth


def logged_step(
    proposed: Iterable[LoggedToken], rows: int, device: torch.device
) -> LoggedTokens | None:
    """As tensors, for those rows that the step has; None when there are none."""
    kept = [one for one in proposed if one.row < rows]
    if not kept:
        return None
    return LoggedTokens(
        row=torch.tensor([one.row for one in kept], device=device),
        token=torch.tensor([one.token for one in kept], device=device),
        reward=torch.tensor([one.reward for one in kept], device=device),
        group=torch.tensor([one.group for one in kept], device=device),
    )
