"""What a verify step with drafts costs a server against one without, as its engine measured it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: How far above break-even speculation must be before it starts. Once it has, it goes on until it
#: falls below break-even itself, so that noise does not flip it.
MARGIN = 1.02


def is_worth(gain: float, *, speculates: bool) -> bool:
    """Whether to speculate at this speed with drafts over that without; ``speculates``: it does
    already."""
    return gain > (1.0 if speculates else MARGIN)


@dataclass(frozen=True)
class StepCost:
    """Median times of a verify step in milliseconds at the batch size where both kinds are known
    best, and ratios by the largest of each group of batch
    sizes (``batch_sizes.batch_bucket``); ``None``: not measured."""

    plain_ms: float | None = None
    draft_ms: float | None = None
    gain: float | None = None  # speed with drafts over that without
    break_evens: Mapping[int, float] = field(default_factory=dict)
    gains: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, counters: Mapping[str, float]) -> StepCost:
        """From the counters of a heartbeat, see ``engine.policy.SpeculationPolicy.counters``."""
        return cls(
            _positive(counters, "step_ms_plain"),
            _positive(counters, "step_ms_spec"),
            _positive(counters, "gain"),
            by_size(counters, "break_even"),
            by_size(counters, "gain"),
        )

    @property
    def break_even(self) -> float | None:
        """The accept length at which a step with drafts pays for itself, at the batch size where
        that is least: the engine itself leaves drafts out where they lose."""
        if self.break_evens:
            return min(self.break_evens.values())
        return self.draft_ms / self.plain_ms if self.plain_ms and self.draft_ms else None


def step_key(group: int, depth: int, nodes: int) -> str:
    """The counter of what a step of this draft shape takes, in milliseconds; depth 0 with 1 node: a
    plain one. ``group``: the largest of its group of batch sizes."""
    return f"step_ms_{group}_{depth}_{nodes}"


@dataclass(frozen=True)
class ShapeTimes:
    """What steps of one boot of a server take by load and shape, as it measured them last."""

    by_shape: Mapping[tuple[int, int, int], float]  # (group, depth, nodes) -> milliseconds
    #: Each step's tree is chosen: what stands there for the whole tree is of steps of any size.
    chooses_trees: bool = False

    @classmethod
    def of(cls, counters: Mapping[str, float]) -> ShapeTimes:
        """From the counters of a heartbeat; what is no time is left out."""
        start, times = "step_ms_", {}
        for key, value in counters.items():
            numbers = key.removeprefix(start).split("_") if key.startswith(start) else []
            if len(numbers) == 3 and all(number.isdecimal() for number in numbers):
                group, depth, nodes = map(int, numbers)
                if 0 < float(value or 0) < float("inf"):
                    times[group, depth, nodes] = float(value)
        return cls(times, any(key.startswith("tree_explored_") for key in counters))

    def plain_ms(self, group: int) -> float | None:
        """Of a step without drafts; ``None``: not measured at this load."""
        return self.by_shape.get((group, 0, 1))

    def drafts_ms(self, group: int, depth: int, nodes: int) -> float | None:
        """Of a step with drafts of this shape; ``None``: not measured at this load."""
        if self.chooses_trees:
            keys = [key for key in self.by_shape if key[0] == group and key[1]]
            times = [self.by_shape[key] for key in keys]
            return times[0] if len(times) == 1 else None
        return self.by_shape.get((group, depth, nodes))


@dataclass(frozen=True)
class TreeShare:
    """How often a server's steps had one shape lately, where each step's tree is chosen."""

    requests_at_once: int  # the largest of the group of batch sizes
    depth: int
    nodes: int  # with the root; 1: drafts were made and none was worth verifying
    share: float  # of the group's steps
    accept_length: float  # expected of these steps
    explored: int  # steps of the group that found out, since the start


def tree_shares(counters: Mapping[str, float]) -> list[TreeShare]:
    """From the counters of a heartbeat, see ``engine.tree_choice.TreePolicy.counters``; the most
    frequent shape of each group first."""
    start, shares = "tree_share_", []
    for key, share in counters.items():
        numbers = key.removeprefix(start).split("_") if key.startswith(start) else []
        if len(numbers) == 3 and all(number.isdecimal() for number in numbers):
            group, depth, nodes = map(int, numbers)
            length = float(counters.get(f"tree_length_{group}_{depth}_{nodes}") or 0.0)
            explored = int(counters.get(f"tree_explored_{group}") or 0)
            shares.append(TreeShare(group, depth, nodes, float(share or 0), length, explored))
    return sorted(shares, key=lambda one: (one.requests_at_once, -one.share, one.depth, one.nodes))


def by_size(counters: Mapping[str, float], name: str) -> dict[int, float]:
    """Counters ``name_N`` by N, the largest of each group of batch sizes, in their order."""
    start = f"{name}_"
    values = {
        int(key.removeprefix(start)): float(value)
        for key, value in counters.items()
        if key.startswith(start)
    }
    return dict(sorted(values.items()))


def _positive(counters: Mapping[str, float], name: str) -> float | None:
    value = float(counters.get(name) or 0.0)
    return value if value > 0 else None
