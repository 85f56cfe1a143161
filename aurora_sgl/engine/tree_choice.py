"""Which tree a step verifies: chosen while it is drafted, by how sure the drafter is.

A step is worth the tokens that it brings less its time at the rate at which the server makes
tokens (Dinkelbach 1967: what maximises tokens - rate * time at the best rate has that rate). Each
drafted token has a chance to be accepted (``calibration``), so the best number of nodes is where
the next one brings less than its row costs (``tree_costs``), and drafting goes on for another level
where that is worth more than the level takes. What a level is worth is learnt too, from the steps
that had it: by how likely the draft is right up to the level before.

What is chosen depends on the drafter and on past steps alone, so that sampled requests keep the
target's law. A batch has one shape, for the sum over its requests. A bounded share of the time goes
to steps of the whole shape and of others, so that what is known stays true.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import isfinite
from typing import Any

from aurora_sgl.batch_sizes import batch_bucket
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.engine.calibration import Ratios
from aurora_sgl.engine.tree_costs import TreeCosts, positive

#: Share of the time that is lost at most to steps that find out.
LOSS = 0.005
_BUDGET = 4.0  # steps' time that may be saved up for that
_RATE_MEMORY = 200.0  # steps over which the rate is averaged
_CELLS = 10  # of the chance that a draft is right up to a level
_LEVEL_MEMORY = 50.0  # steps of one of them
_LEVEL_PRIOR = 3.0  # steps' worth of belief that the next level is as good as this one
_GUESS = 0.5  # tokens' worth of a level after one that is right for sure
_NONE = (0.0, 0.0)
_MOST_SHAPES = 6  # of a group that the heartbeat tells of
_SHAPE_MEMORY = 512  # steps after which those so far count half


class _Group:
    """What is known of steps of one group of batch sizes."""

    def __init__(self, whole: DraftShape) -> None:
        self.costs = TreeCosts(whole.depth, whole.nodes)
        self.tokens = self.seconds = self.weight = (
            0.0  # sums of the last steps, of which the rate is made
        )
        #: By level and how likely the draft is right up to it: tokens' worth of drafting on.
        self.worth = [
            [
                [_LEVEL_PRIOR, _LEVEL_PRIOR * _GUESS * (cell + 0.5) / _CELLS]
                for cell in range(_CELLS)
            ]
            for _ in range(whole.depth)
        ]
        self.budget = 0.0  # seconds that may be lost by finding out
        self.lost = 0.0  # by the last steps that did, each
        self.explored = 0
        #: By depth and nodes: steps, requests in them, tokens expected of those; older ones count
        #: less.
        self.shapes: dict[tuple[int, int], list[float]] = {}
        self.steps = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def state(self) -> dict[str, Any]:
        return {
            "costs": self.costs.state(),
            "rate": [self.tokens, self.seconds, self.weight],
            "worth": [[list(cell) for cell in level] for level in self.worth],
        }

    def restore(self, state: Mapping[str, Any], *, same_drafter: bool) -> None:
        """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for what :meth:`state` did not
        make."""
        self.costs.restore(state["costs"])
        if not same_drafter:
            return
        tokens, seconds, weight = (positive(x) for x in state["rate"])
        worth = [[[float(x) for x in cell] for cell in level] for level in state["worth"]]
        if [len(level) for level in worth] != [_CELLS] * len(self.worth):
            raise ValueError("levels of another number")
        for cell in (cell for level in worth for cell in level):
            if len(cell) != 2 or not (isfinite(cell[1]) and 0 < cell[0] < 1e6):
                raise ValueError("what a level is worth is no number")
        self.tokens, self.seconds, self.weight, self.worth = tokens, seconds, weight, worth

    def count(self, step: TreeStep) -> None:
        self.steps += 1
        if self.steps % _SHAPE_MEMORY == 0:
            self.shapes = {
                shape: [x / 2 for x in sums] for shape, sums in self.shapes.items() if sums[0] > 1
            }
        sums = self.shapes.setdefault((step.depth, step.nodes), [0.0, 0.0, 0.0])
        sums[0] += 1.0
        sums[1] += len(step.rows)
        sums[2] += len(step.rows) + step.expected

    def level_worth(self, level: int, right: float) -> float:
        weight, total = self.worth[level][min(_CELLS - 1, int(right * _CELLS))]
        return total / weight

    def learn_worth(self, level: int, right: float, tokens: float) -> None:
        if not isfinite(tokens):
            return
        cell = self.worth[level][min(_CELLS - 1, int(right * _CELLS))]
        keep = min(1.0, _LEVEL_MEMORY / (cell[0] + 1.0))
        cell[0] = cell[0] * keep + 1.0
        cell[1] = cell[1] * keep + tokens

    def learn_rate(self, tokens: float, seconds: float) -> None:
        keep = 1.0 - 1.0 / _RATE_MEMORY
        self.tokens = self.tokens * keep + tokens
        self.weight = self.weight * keep + 1.0
        self.seconds = self.seconds * keep + seconds


class TreeStep:
    """One step's tree, level by level as it is drafted.

    ``rows``: of the requests whose drafts count, in the batch. ``forced``: the nodes that it gets
    whatever pays; ``all_levels``: it has all of them.
    """

    __slots__ = (
        *("_all_levels", "_before", "_best", "_forced", "_group", "_most", "_ratios", "_value"),
        *("batch_size", "depth", "expected", "nodes", "rows", "scores", "topk"),
    )

    def __init__(
        self,
        group: _Group,
        ratios: list[Ratios],  # by row that counts
        rows: list[int],
        whole: DraftShape,
        batch_size: int,
        forced: int = 0,
        all_levels: bool = False,
    ) -> None:
        self._group, self._ratios, self.rows = group, ratios, rows
        self._forced, self._all_levels = forced, all_levels
        self.batch_size, self.topk, self._most = batch_size, whole.topk, whole.nodes - 1
        self.depth, self.nodes = 0, 1
        self.expected = 0.0  # accepted nodes of all rows that count
        self.scores: list[list[float]] = [[] for _ in rows]  # of all candidates
        #: (score, chance) of those that may become nodes, the best first
        self._best: list[list[tuple[float, float]]] = [[] for _ in rows]
        self._value = 0.0  # tokens that the best number of nodes is worth
        self._before = -1.0  # how likely the draft is right up to the level before

    @property
    def group(self) -> _Group:
        return self._group

    def ratios(self, place: int) -> Ratios:
        return self._ratios[place]

    @property
    def explores(self) -> bool:
        return self._forced > 0

    def level(self, candidates: list[list[float]], beams: list[list[float]], last: bool) -> bool:
        """Take in one more level, and whether the next one is drafted too.

        ``candidates``: path scores [batch][candidates of this level]; ``beams``: [batch][topk] of
        those below which the next level is drafted; ``last``: there is no next level.
        """
        level, group = self.depth, self._group
        self.depth += 1
        right = 0.0
        for place, row in enumerate(self.rows):
            chance = self._ratios[place].chance
            self.scores[place] += candidates[row]
            self._take(place, level, sorted(candidates[row], reverse=True))
            mass = sum([chance(level, score) for score in beams[row]])
            right += min(mass, 1.0) if isfinite(mass) else 0.0
        right /= len(self.rows)
        value, rate, count = self._choose(), group.rate, len(self.rows)
        on = -1.0
        if not last:
            on = count * group.level_worth(level, right) - rate * group.costs.levels[level]
        if level:
            group.learn_worth(level - 1, self._before, (value - self._value + max(0.0, on)) / count)
        self._value, self._before = value, right
        return not last and (on > 0.0 or self._all_levels or not rate)

    def _take(self, place: int, level: int, scores: list[float]) -> None:
        best, most, chance = self._best[place], self._most, self._ratios[place].chance
        least = best[-1][0] if len(best) == most else 0.0
        best += [(score, chance(level, score)) for score in scores[:most] if score > least]
        if level:
            best.sort(reverse=True)
            del best[most:]

    def _choose(self) -> float:
        """Choose the nodes among the candidates so far: tokens that they are worth."""
        rest, rate = self._group.costs.rest, self._group.rate
        value = chosen_value = -rate * rest[1]
        before, self.nodes = rest[1], 1
        for nodes, nth in enumerate(zip_longest(*self._best, fillvalue=_NONE), start=2):
            seconds = rest[nodes]
            value += sum([chance for _, chance in nth]) - rate * (seconds - before)
            before = seconds
            if value >= chosen_value:
                self.nodes, chosen_value = nodes, value
        return chosen_value

    def end(self) -> int:
        """The number of nodes of the step, with the root."""
        if self._forced:
            candidates = self.topk + (self.depth - 1) * self.topk**2
            self.nodes = min(self._forced, candidates + 1)
        most = self.nodes - 1
        self.expected = sum([sum([chance for _, chance in one[:most]]) for one in self._best])
        return self.nodes

    def level_of(self, candidate: int) -> int:
        return 0 if candidate < self.topk else 1 + (candidate - self.topk) // self.topk**2


@dataclass(frozen=True, slots=True)
class Grown:
    """A step's tree, until it is known what was accepted of it."""

    step: TreeStep
    chosen: list[list[int]]  # [requests][nodes - 1] candidates


class TreePolicy:
    """What one server knows, and the steps that it makes of it.

    ``whole``: the shape that the server was started with, which no step exceeds.
    """

    def __init__(self, whole: DraftShape, *, loss: float = LOSS) -> None:
        self.whole = whole
        self._loss = loss
        self._ratios = {sampled: Ratios(whole.depth) for sampled in (False, True)}
        self._groups: dict[int, _Group] = {}

    def group(self, group: int) -> _Group:
        if group not in self._groups:
            self._groups[group] = _Group(self.whole)
        return self._groups[group]

    def begin(self, batch_size: int, rows: list[int], sampled: list[bool]) -> TreeStep:
        """The next step; ``rows``: those of the batch whose drafts count, one at least."""
        group = self.group(batch_bucket(batch_size))
        forced, all_levels = self._finds_out(group)
        ratios = [self._ratios[one] for one in sampled]
        return TreeStep(group, ratios, rows, self.whole, batch_size, forced, all_levels)

    def _finds_out(self, group: _Group) -> tuple[int, bool]:
        """(nodes that this step gets whatever pays, or 0; whether it has all levels)."""
        untimed = group.costs.untimed
        if untimed is not None:
            return untimed, True
        if group.budget < group.lost:
            return 0, False
        group.explored += 1
        if group.explored % 2:
            return self.whole.nodes, True
        knots = group.costs.knots
        return knots[group.explored // 2 % len(knots)], False

    def done(self, step: TreeStep, levels: list[float], rest: float) -> float:
        """A step took so many seconds: each level but the first, and all else. Returns how many
        times as long an average step takes."""
        group = step.group
        group.costs.add(levels, step.nodes, rest)
        seconds = group.costs.of(step.depth, step.nodes)
        tokens = step.batch_size + step.expected
        if not (isfinite(tokens) and isfinite(seconds) and seconds > 0):
            return 1.0
        group.count(step)
        if not step.explores or group.costs.untimed is not None or not group.seconds:
            group.learn_rate(tokens, seconds)
            group.budget = min(group.budget + self._loss * seconds, _BUDGET * seconds)
        else:
            lost = max(0.0, seconds - tokens / group.rate)
            group.budget -= lost
            group.lost += (lost - group.lost) / 4.0
        return group.seconds / group.weight / seconds

    def learn(self, step: TreeStep, row: int, chosen: list[int], accepted: list[int]) -> None:
        """What became of one request's drafts; ``row``: its place among ``step.rows``.

        ``chosen``: the candidate that each node 1..nodes-1 is; ``accepted``: nodes.
        """
        scores, ratios = step.scores[row], step.ratios(row)
        hits = set(accepted)
        for node, candidate in enumerate(chosen, start=1):
            score = scores[candidate]
            if 0.0 < score <= 1.0:
                ratios.count(step.level_of(candidate), score, node in hits)

    def swapped(self) -> None:
        """Another drafter is live: what depends on it fades, what steps take does not."""
        for ratios in self._ratios.values():
            ratios.fade()
        for group in self._groups.values():
            for level in group.worth:
                for cell in level:
                    keep = min(1.0, _LEVEL_PRIOR / cell[0])
                    cell[0], cell[1] = cell[0] * keep, cell[1] * keep

    @property
    def groups(self) -> list[int]:
        """Groups of batch sizes that had steps."""
        return sorted(self._groups)

    @property
    def steps(self) -> int:
        """That were made so."""
        return sum(group.steps for group in self._groups.values())

    def counters(self) -> dict[str, float]:
        """For each group of batch sizes, N the largest of it: ``tree_share_N_D_M``, share of the
        last steps that had depth D and M nodes (0 and 1: no drafts), ``tree_length_N_D_M``, the
        accept length expected of them, and ``tree_explored_N``, steps that found out so far."""
        result = {}
        for name, group in self._groups.items():
            steps = sum(sums[0] for sums in group.shapes.values())
            result[f"tree_explored_{name}"] = float(group.explored)
            most = sorted(group.shapes.items(), key=lambda item: -item[1][0])[:_MOST_SHAPES]
            for (depth, nodes), (count, requests, tokens) in most:
                result[f"tree_share_{name}_{depth}_{nodes}"] = round(count / steps, 3)
                result[f"tree_length_{name}_{depth}_{nodes}"] = round(tokens / requests, 3)
        return result

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` takes, of plain numbers and texts."""
        return {
            "whole": list(self.whole),
            "ratios": [self._ratios[sampled].state() for sampled in (False, True)],
            "groups": {str(name): group.state() for name, group in self._groups.items()},
        }

    def restore(self, state: Mapping[str, Any], *, same_drafter: bool) -> None:
        """Go on from what another process learnt; of another drafter only what steps take.

        Raises ``ValueError`` for the state of another shape, and for a damaged one: then nothing
        of it is taken.
        """
        try:
            if list(state["whole"]) != list(self.whole):
                raise ValueError(f"it is of trees up to {state['whole']}, here {list(self.whole)}")
            other = TreePolicy(self.whole, loss=self._loss)
            for name, of_group in state["groups"].items():
                other.group(int(name)).restore(of_group, same_drafter=same_drafter)
            for sampled, of_ratios in zip((False, True), state["ratios"], strict=True):
                if same_drafter:
                    other._ratios[sampled].restore(of_ratios)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is damaged: {type(error).__name__}: {error}") from error
        self._ratios, self._groups = other._ratios, other._groups
