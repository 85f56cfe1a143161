"""What the demo measures on held-out prompts: speed as served, accept length in one draft shape.

A server gives each step the draft shape that pays at that moment, so two measurements of one
drafter can have other mixes of shapes, and other accept lengths. So accept lengths are measured
with whole drafts in every step, and only such steps are counted; tokens/s beside it, with what the
server itself chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from aurora_sgl.demo.prompts import Prompt
from aurora_sgl.demo.traffic import TrafficSample
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.intervals import Difference, accept_length, or_none, paired_difference
from aurora_sgl.store import queries


@dataclass(frozen=True)
class WholeDrafts:
    """Verify steps in one draft shape and what they accepted, by the number of the prompt."""

    shape: DraftShape
    counts: dict[int, tuple[int, int]] = field(default_factory=dict)  # -> accepted, verify steps

    @property
    def accept_length(self) -> float | None:
        accepted = sum(accepted for accepted, _ in self.counts.values())
        steps = sum(steps for _, steps in self.counts.values())
        return or_none(accept_length(accepted, steps))

    def difference(self, later: WholeDrafts) -> Difference:
        """``later`` less this one, on the prompts that both have, with the gate's interval."""
        both = sorted(self.counts.keys() & later.counts.keys())
        return paired_difference([(*self.counts[n], *later.counts[n]) for n in both])


def whole_drafts(
    s: Session, sample: TrafficSample, prompts: Sequence[Prompt], shape: DraftShape
) -> WholeDrafts | None:
    """What the store has of a sample's requests; ``None`` until all of them are finished there."""
    numbers = {prompt.prompt: number for number, prompt in enumerate(prompts)}
    counts: dict[int, tuple[int, int]] = {}
    for one in sample.sent:
        if one.error:
            continue
        rows = queries.requests.requests_by_rid(s, one.rid)
        if not rows or rows[0].status != "finished":
            return None
        mine = [
            tally
            for tally in queries.request_counts.tallies(s, rows[0].id)
            if (tally.depth, tally.topk, tally.nodes) == (shape.depth, shape.topk, shape.nodes)
        ]
        if mine:
            accepted, steps = (sum(t.accepted for t in mine), sum(t.verify_steps for t in mine))
            counts[numbers[one.prompt.prompt]] = (accepted, steps)
    return WholeDrafts(shape, counts)
