"""A step's tree, grown as far as it pays: SGLang's draft loop asked level by level.

Between two levels SGLang reads anew how many levels there are, and once all are drafted how many
nodes are verified (0.5.21 to 0.5.23: eagle_worker_v2's ``draft_forward``, ``draft`` and
``verify``). So the hooks of its two helpers put in what was chosen (``tree_choice``). What is laid
out before the first level, the places of the drafter's cache, is for the whole shape.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aurora_sgl import wire
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.engine.parts import Parts
from aurora_sgl.engine.request_state import RequestState
from aurora_sgl.engine.step_shape import StepShape
from aurora_sgl.engine.tree_choice import Grown, TreePolicy, TreeStep

#: Seconds between two states that are kept.
KEEP_SECONDS = 60.0
#: Steps after which a start does without what an earlier one learnt.
LATE_STEPS = 2000

logger = logging.getLogger("aurora_sgl")

_CHOOSING = "choosing a step's drafts"


class GrowingTree:
    """The trees of one scheduler process; one step at a time."""

    def __init__(self, shape: StepShape, policy: TreePolicy, parts: Parts) -> None:
        self.policy = policy
        self._parts = parts
        self._shape = shape
        self._step: TreeStep | None = None
        self._levels: list[float] = []  # seconds of each level but the first
        self._level_begun = 0.0
        self._kept_at = time.monotonic()
        self._chosen: list[list[int]] = []  # [requests][nodes - 1] candidates

    def begin(self, states: Sequence[RequestState | None]) -> None:
        """The next step's tree is left open, for the requests of its batch."""
        rows, sampled = [], []
        for row, state in enumerate(states):
            if state is not None and state.speculates and not state.one_token:
                rows.append(row)
                sampled.append(not state.greedy)
        self._levels, self._chosen = [], []
        self._step = self.policy.begin(len(states), rows, sampled) if rows else None

    def forget(self) -> None:
        """The step at hand has a shape that was put in."""
        self._step = None

    @property
    def is_open(self) -> bool:
        return self._step is not None

    def select(self, original: Callable[..., Any], level: int, *args: Any, **kw: Any) -> Any:
        """Around ``select_top_k_tokens``, once a level."""
        step = self._step
        if step is None:
            return original(level, *args, **kw)
        if level:
            self._levels.append(time.perf_counter() - self._level_begun)
        result = original(level, *args, **kw)
        _, _, beams, (scores, _, _) = result
        last = level == self._shape.whole.depth - 1

        def goes_on() -> bool:
            return step.level(scores.flatten(1).tolist(), beams.tolist(), last) or last

        if not self._parts.attempt(_CHOOSING, goes_on, True):
            self._shape.cut(level + 1)
        self._level_begun = time.perf_counter()
        return result

    def organize(
        self,
        original: Callable[..., Any],
        scores: Any,
        tokens: Any,
        parents: Any,
        nodes: int,
        *args: Any,
        **kw: Any,
    ) -> Any:
        """Around ``organize_draft_results``, once the last level is drafted."""
        step = self._step
        if step is None:
            return original(scores, tokens, parents, nodes, *args, **kw)
        depth, topk = len(scores), self._shape.whole.topk
        most = min(nodes, DraftShape(depth, topk, 1).candidates + 1)
        nodes = self._parts.attempt(_CHOOSING, step.end, most)
        self._shape.cut(depth, nodes)
        result = original(scores, tokens, parents, nodes, *args, **kw)
        self._chosen = result[1].tolist()
        return result

    def done(self, seconds: float) -> float:
        """A step took so long: what an average one of an open tree would have taken. A step of a
        shape that was put in took what it took."""
        step = self._step
        if step is None or not self._chosen:
            return seconds
        return seconds * self.policy.done(step, self._levels, seconds - sum(self._levels))

    def take(self) -> Grown | None:
        """What :meth:`learn` needs of the step at hand; None: it had another shape."""
        step = self._step
        return Grown(step, self._chosen) if step is not None and self._chosen else None

    def learn(self, grown: Grown, paths: Mapping[int, list[int]]) -> None:
        """What became of a step's drafts. ``paths``: the accepted nodes by row of the batch, of
        requests whose draft KV is all of the live drafter."""
        for place, row in enumerate(grown.step.rows):
            if row in paths:
                self.policy.learn(grown.step, place, grown.chosen[row], paths[row])

    # -- between two starts ----------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        return {"trees": 1.0, **self.policy.counters()}

    def memory(self) -> dict[str, Any]:
        """What the next start goes on from, once in ``KEEP_SECONDS``; {} in between."""
        now = time.monotonic()
        if now - self._kept_at < KEEP_SECONDS:
            return {}
        self._kept_at = now
        return self.policy.state()

    def remember(self, earlier: wire.Trees) -> None:
        """Go on from what an earlier start learnt, unless this one has learnt enough itself."""
        if self.policy.steps > LATE_STEPS:
            return
        try:
            self.policy.restore(earlier.state, same_drafter=earlier.same_drafter)
        except ValueError as error:
            logger.warning("aurora: what an earlier start learnt of trees is not used: %s", error)
        else:
            if not earlier.same_drafter:
                logger.info(
                    "aurora: another drafter is live than when trees were learnt: only step times "
                    "are taken over"
                )
