"""What one verify step did, told for the page of one request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACCEPTED, CORRECTION, BONUS, PLAIN = "accepted", "correction", "bonus", "plain"
UNKNOWN = -1


@dataclass(frozen=True)
class Token:
    """One output token of a step. ``cut``: made, and not kept after a stop or a grammar cut."""

    id: int  # UNKNOWN where the store has counts alone
    kind: str  # accepted | correction | bonus | plain
    cut: bool


@dataclass(frozen=True)
class Proposal:
    """One node of the draft tree."""

    node: int
    depth: int  # from 1
    token: int
    accepted: bool


@dataclass(frozen=True)
class StepTold:
    number: int
    tokens: list[Token]
    proposals: list[Proposal]  # by depth, the drafter's first choices first
    event: Mapping[str, Any]

    @property
    def rejected_at(self) -> int:
        """Depth of the first rejection; 0: none was rejected."""
        return int(self.event["first_rejected_at"])


def tell(events: Iterable[Mapping[str, Any]]) -> list[StepTold]:
    """``events``: decoded rows of ``acceptance_event``, see ``queries.events.events``."""
    return [_step(event) for event in events]


def have_tokens(events: Iterable[Mapping[str, Any]]) -> bool:
    """Whether they say which tokens they were: those of requests that may not be learnt from don't,
    unless AURORA_KEEP_OPTED_OUT_TOKENS says otherwise."""
    return any(len(event["target_tokens"]) for event in events)


def _step(event: Mapping[str, Any]) -> StepTold:
    draft: Sequence[int] = event["draft_tokens"]
    accepted: Sequence[int] = event["accepted_nodes"]
    last: int | None = UNKNOWN
    tokens = [UNKNOWN] * int(event["accepted"])
    if len(event["target_tokens"]):
        tokens, last = [draft[node - 1] for node in accepted], _target_token(event)
    kinds = [ACCEPTED] * len(tokens)
    if last is not None:
        tokens.append(last)
        kinds.append(_kind_of_last(event))
    kept = int(event["kept"])
    output = [
        Token(id, kind, place >= kept)
        for place, (id, kind) in enumerate(zip(tokens, kinds, strict=True))
    ]
    return StepTold(int(event["step"]), output, _proposals(draft, event["draft_parents"], accepted),
                    event)  # fmt: skip


def _kind_of_last(event: Mapping[str, Any]) -> str:
    if not event["depth"]:
        return PLAIN
    return CORRECTION if event["first_rejected_at"] else BONUS


def _target_token(event: Mapping[str, Any]) -> int | None:
    """The target's own token at the end of a step: for greedy steps it stands at the number of
    the last accepted node, for sampled ones at the end of the accepted path."""
    accepted: Sequence[int] = event["accepted_nodes"]
    greedy = event["accept_rule"] == "greedy"
    index = (accepted[-1] if accepted else 0) if greedy else len(accepted)
    target: Sequence[int] = event["target_tokens"]
    return target[index] if index < len(target) else None


def _proposals(
    draft: Sequence[int], parents: Sequence[int], accepted: Sequence[int]
) -> list[Proposal]:
    depth = {0: 0}
    proposals = []
    for node, (token, parent) in enumerate(zip(draft, parents, strict=True), 1):
        depth[node] = depth.get(parent, 0) + 1
        proposals.append(Proposal(node, depth[node], token, node in set(accepted)))
    return sorted(proposals, key=lambda p: (p.depth, p.node))
