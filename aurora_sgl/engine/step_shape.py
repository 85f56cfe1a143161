"""Smaller trees for busier steps: the draft shapes that one server moves between.

Verifying costs more the more rows a step has, so the tree that pays for one request alone does not
for several at once. SGLang's worker reads depth and number of nodes anew in every step; its own
adaptive mode moves them for chains. Here a step of a tree is made smaller in the same way, within
what the server was started with, so that its cache holds every shape. No two shapes share depth and
top-k: what the store keeps by them is of one shape.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from aurora_sgl.draft_shape import NO_DRAFT, DraftShape

_SKIP_SWITCH = "SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND"
_LEVELS, _NODES = "speculative_num_steps", "speculative_num_draft_tokens"
_SIBLINGS = 4  # nodes of the widest tree of one level, with the root


def shapes_within(whole: DraftShape) -> tuple[DraftShape, ...]:
    """The shapes up to what the server was started with, those that take longer last. A chain has a
    node for each level. Trees begin with one draft, then several on one level, which need no more
    of the drafter; each further level doubles the nodes."""
    depth, topk, nodes = whole.depth, whole.topk, whole.nodes
    if nodes == 2 and depth == 1:
        return (whole,)
    if whole.is_chain:
        return tuple(DraftShape(level) for level in range(1, depth + 1))
    smaller = [DraftShape(1)]
    if depth > 1:
        smaller.append(DraftShape(1, topk, min(topk + 1, nodes, _SIBLINGS)))
    smaller += [
        DraftShape(level, topk, max(level + 1, min(nodes, 2**level))) for level in range(2, depth)
    ]
    return tuple(dict.fromkeys((*smaller, whole)))


class StepShape:
    """Puts a shape into SGLang's worker for one step."""

    def __init__(self, worker: Any, whole: DraftShape) -> None:
        self.whole = whole  # what the server was started with
        #: Whether the next step, if it is one without drafts, computes their draft KV all the same,
        #: so that its requests can go on with drafts.
        self.keeps_kv = False
        #: Seconds of the last step that draft KV took for which a plain step has no need.
        self.kv_seconds = 0.0
        self.current = whole  # of the step at hand
        self._worker = worker

    @contextmanager
    def set_to(self, shape: DraftShape) -> Iterator[None]:
        """Within, steps have drafts of this shape, or none."""
        self.kv_seconds = 0.0
        changes = self._changes(shape) if shape != self.whole else []
        names = [*((part, name) for part, name, _ in changes), *self._numbers]
        before = [(part, name, getattr(part, name)) for part, name in names]
        for part, name, value in changes:
            setattr(part, name, value)
        self.current = shape
        try:
            with self._with_kv() if self.keeps_kv and not shape.depth else nullcontext():
                yield
        finally:
            for part, name, value in before:
                setattr(part, name, value)
            self.current = self.whole
            self.keeps_kv = False

    @property
    def _numbers(self) -> list[tuple[Any, str]]:
        return [
            (part, name)
            for part in (self._worker, self._worker.draft_worker)
            for name in (_LEVELS, _NODES)
        ]

    def cut(self, depth: int, nodes: int = 0) -> None:
        """Within a step of the whole shape that is being drafted: it ends after so many levels;
        ``nodes``: and verifies so many of their candidates, or with 1 the root alone."""
        worker, drafter = self._worker, self._worker.draft_worker
        # Of a path SGLang keeps one node a level, for which it needs as many nodes: a tree of few
        # nodes has no path as long as its levels. And without a level it leaves draft KV out.
        levels = min(depth, nodes - 1) if nodes else depth
        setattr(worker, _LEVELS, max(1, levels))
        setattr(drafter, _LEVELS, levels)
        if nodes:
            setattr(worker, _NODES, nodes)
            setattr(drafter, _NODES, nodes)
        if nodes == 1:  # draft KV is computed all the same
            self.current, self.keeps_kv = NO_DRAFT, True
        elif nodes:
            self.current = DraftShape(depth, self.whole.topk, nodes)

    @property
    def can_keep_kv(self) -> bool:
        """Whether this SGLang has what ``keeps_kv`` leans on: a step must not fail for it."""
        from sglang.srt import environ

        drafter = self._worker.draft_worker
        has_switch = hasattr(getattr(environ, "envs", None), _SKIP_SWITCH)
        return has_switch and hasattr(drafter, "_draft_extend_for_decode")

    @contextmanager
    def _with_kv(self) -> Iterator[None]:
        """Within, steps without drafts compute draft KV, as SGLang's own zero-step mode does."""
        from sglang.srt.environ import envs

        drafter = self._worker.draft_worker
        extend = drafter._draft_extend_for_decode

        def timed(*args: Any, **kw: Any) -> Any:
            begun = time.perf_counter()
            result = extend(*args, **kw)
            self.kv_seconds = time.perf_counter() - begun
            return result

        drafter._draft_extend_for_decode = timed
        try:
            with envs.SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND.override(False):
                yield
        finally:
            del drafter._draft_extend_for_decode

    def of_step(self, nodes: int) -> DraftShape:
        """The shape of the step at hand, which verifies so many nodes: what was put in, or what
        SGLang's own adaptive mode made of a chain."""
        if nodes == self.current.nodes:
            return self.current
        return DraftShape(nodes - 1) if nodes <= self.whole.depth + 1 else self.whole

    def _changes(self, shape: DraftShape) -> list[tuple[Any, str, Any]]:
        """What differs from the whole shape: object, attribute, value."""
        worker, drafter = self._worker, self._worker.draft_worker
        # SGLang's own zero-step mode verifies the root alone and asks nothing of the drafter.
        parts = [worker, drafter] if shape.depth or self.keeps_kv else [worker]
        changes = [(part, _LEVELS, shape.depth) for part in parts]
        changes += [(part, _NODES, shape.nodes) for part in parts]
        if not shape.depth:
            return changes
        # Where a level's tokens lie in the cache follows from the number of levels. A server that
        # was started with one level has no such backend.
        if drafter.draft_attn_backend is not None:
            changes.append((drafter.draft_attn_backend, _LEVELS, shape.depth))
        if worker.topk == 1:  # a chain of one level has no parents
            for name, width in (
                ("_topk1_parents_prealloc", shape.depth if shape.depth > 1 else 0),
                ("_topk1_score_indices_prealloc", shape.depth),
            ):
                changes.append((drafter, name, getattr(drafter, name)[:, :width].contiguous()))
        return changes
