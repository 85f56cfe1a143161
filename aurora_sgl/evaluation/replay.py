"""Exact replay: the accept length that a drafter would have had on a logged request.

For a greedy request the target's continuation is in the log, so what it would have accepted of
any proposal is known without running it. For a sampled one the same holds in distribution, under
SGLang's default rule (``target_sampling``): walking through a node's children it accepts each with
the target's own probability and otherwise draws from the rest, so the emitted token is a draw from
the target whatever was proposed, and is accepted if and only if it is among the children. A logged
answer is such a draw. Under ``rejection_sampling`` (min(1, p / q)) what is emitted depends on the
proposal: there the counts are expectations (see ``evaluation.expected``), over chains.

What a drafter proposes is its own business (:meth:`~aurora_sgl.drafter.model.Drafter.accepted`).
It is asked for all positions at once, which are then walked as the server would have: from the
first output token, on by ``accepted + 1``.

What lies behind the last logged token is unknown. A step whose accepted tokens reach the end of
the log before the draft's depth is *undetermined*: it is left out here, and :func:`is_determined`
leaves it out of a server's records, so that both sides count the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.device import as_served, device_of
from aurora_sgl.evaluation.expected import expected_counts
from aurora_sgl.evaluation.settings import EvaluationSettings
from aurora_sgl.intervals import accept_length
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.sequences.splits import REJECTION


@dataclass(frozen=True)
class RequestReplay:
    """What one request would have been accepted; sums over its determined verify steps, which are
    expectations where the accept rule draws. Requests of one ``conversation`` (a key, ``""``: not
    known) are correlated."""

    request_id: int
    verify_steps: float
    accepted: float
    domain: str = "default"
    accept_rule: str = "greedy"
    conversation: str = ""

    @property
    def accept_length(self) -> float:
        """See :func:`aurora_sgl.intervals.accept_length`."""
        return accept_length(self.accepted, self.verify_steps)


def is_determined(root: int, accepted: int, length: int, depth: int) -> bool:
    """Whether a verify step from position ``root`` is known from a log of ``length`` tokens.

    ``root`` is the position of the bonus token that the draft starts from.
    """
    logged = length - 1 - root
    return logged >= 1 and (accepted < logged or depth <= logged)


@torch.inference_mode()
def replay(
    drafter: Drafter, sequences: Iterable[Sequence], shape: DraftShape, head: TargetHead
) -> list[RequestReplay]:
    """Replay requests in the drafter's own dtype (cast it to the served one first).

    Requests must be ones that ``splits.why_not_judged`` lets through; the caller picks them. One
    result a request, also where it has no determined step.
    """
    return [replay_one(drafter, sequence, shape, head) for sequence in sequences]


@torch.inference_mode()
def replay_one(
    drafter: Drafter, sequence: Sequence, shape: DraftShape, head: TargetHead
) -> RequestReplay:
    """See :func:`replay`."""
    sequence, head = sequence.to(drafter.device), head.to(drafter.device)
    if sequence.accept_rule == REJECTION:
        return _replayed(sequence, *expected_counts(drafter, sequence, shape.depth, head))
    steps = determined_steps(drafter, sequence, shape, head)
    return _replayed(sequence, len(steps), sum(accepted for _, accepted in steps))


@torch.inference_mode()
def determined_steps(
    drafter: Drafter, sequence: Sequence, shape: DraftShape, head: TargetHead
) -> list[tuple[int, int]]:
    """(root, accepted drafts) of each verify step as the server would have made them; for accept
    rules under which a log says what is accepted. All on the drafter's device."""
    length, first = len(sequence.tokens), sequence.output_start
    roots = torch.arange(first, min(length - 2, sequence.rows) + 1)
    counts = drafter.accepted(sequence.tokens, sequence.features, roots, shape, head).tolist()
    steps: list[tuple[int, int]] = []
    root = first
    while root - first < len(counts):
        taken = counts[root - first]
        if not is_determined(root, taken, length, shape.depth):
            break
        steps.append((root, taken))
        root += taken + 1
    return steps


def _replayed(sequence: Sequence, steps: float, accepted: float) -> RequestReplay:
    return RequestReplay(
        sequence.request_id,
        steps,
        accepted,
        sequence.domain,
        sequence.accept_rule,
        sequence.conversation,
    )


def replay_both(
    base: Drafter,
    candidate: Drafter,
    sequences: Iterable[Sequence],
    head: TargetHead,
    settings: EvaluationSettings,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[RequestReplay], list[RequestReplay]]:
    """Both over the same requests, in the served dtype and draft shape. ``progress`` gets how many
    were replayed."""
    old, new = as_served(base, settings), as_served(candidate, settings)
    head = head.to(device_of(settings))
    before: list[RequestReplay] = []
    after: list[RequestReplay] = []
    for sequence in sequences:
        before.append(replay_one(old, sequence, settings.shape, head))
        after.append(replay_one(new, sequence, settings.shape, head))
        if progress is not None:
            progress(len(after))
    return before, after
