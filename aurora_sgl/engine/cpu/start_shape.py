"""How deep and how wide to draft on this CPU: what a shape brings against what it costs here.

Verifying more tokens costs what a few more rows add to a linear layer: next to nothing where
reading the weights takes longest, as much again where the processor has no bfloat16. That is timed
at start. Another step of the drafter adds a fixed part. What a shape brings differs by drafter: the
figures are exact replays of two (SmolLM2-135M), and what replay said of the live version in one
shape tells where between or beyond them it stands.
"""

from __future__ import annotations

import time

import torch

from aurora_sgl.draft_shape import DraftShape, ReplayedShape
from aurora_sgl.engine.cpu import linear, native
from aurora_sgl.engine.cpu.packed import pack

#: Of a target's step for one token: a step of an EAGLE3 drafter; making the tree, and the step that
#: extends the drafter's cache by what was accepted (SmolLM2-135M with 8,192 draft tokens).
_DRAFT_STEP, _DRAFT_REST = 0.07, 0.15


#: Accept lengths by shape: of a drafter that had learnt from 72 requests of the demo, and of the
#: one that came of all its 378.
YOUNG_AND_LEARNT = {
    DraftShape(1, 1, 2): (1.31, 1.47),
    DraftShape(1, 3, 4): (1.45, 1.63),
    DraftShape(2, 4, 4): (1.53, 1.84),
    DraftShape(2, 4, 5): (1.58, 1.92),
    DraftShape(2, 4, 6): (1.60, 1.97),
    DraftShape(3, 4, 6): (1.63, 2.08),
    DraftShape(3, 4, 8): (1.64, 2.15),
}


SIZES = sorted({1, *(shape.nodes for shape in YOUNG_AND_LEARNT)})
#: A drafter that learns on gains more from larger trees than is known yet: of shapes within this
#: share of the fastest the one that brings most is taken.
_NEAR = 0.95


def brings(replayed: ReplayedShape | None = None) -> dict[DraftShape, float]:
    """Accept lengths by shape of a drafter with this result in replay; of a young one without."""
    share = 0.0
    if replayed is not None:
        shape = replayed.shape
        if shape in YOUNG_AND_LEARNT:
            young, learnt = YOUNG_AND_LEARNT[shape]
            share = max(0.0, (replayed.accept_length - young) / (learnt - young))
    return {
        shape: young + share * (learnt - young)
        for shape, (young, learnt) in YOUNG_AND_LEARNT.items()
    }


def best(rows: dict[int, float], replayed: ReplayedShape | None = None) -> DraftShape:
    """The shape that brings most tokens per second to one request alone.

    ``rows``: time of the target's step by its rows, in any unit, for all of ``SIZES``. With more
    requests at once each node costs more; the server then leaves drafts out where they lose.
    """
    lengths = brings(replayed)

    def speed(shape: DraftShape) -> float:
        drafts = _DRAFT_STEP * (shape.depth - 1) + _DRAFT_REST
        return lengths[shape] / (rows[shape.nodes] / rows[1] + drafts)

    fastest = max(map(speed, lengths))
    near = [shape for shape in lengths if speed(shape) >= _NEAR * fastest]
    return max(near, key=lambda shape: lengths[shape])


def measured() -> dict[int, float]:
    """Milliseconds of bfloat16 linear layers by rows, for ``SIZES``, on one thread; takes 0.4 s."""
    weights = [torch.full((1536, 1536), 0.5, dtype=torch.bfloat16) for _ in range(8)]
    packed = [pack(w) for w in weights] if linear.choose().few == linear.PACKED else []

    def once(rows: int) -> float:
        x = torch.full((rows, 1536), 0.5, dtype=torch.bfloat16)
        begun = time.thread_time()  # others may be running on this machine
        for index, weight in enumerate(weights):
            if packed:
                packed[index](x, None)
            elif linear.choose().few == linear.OWN:
                linear.own(x, weight, None)
            else:
                torch.nn.functional.linear(x, weight)
        return time.thread_time() - begun

    with native.one_thread():  # a thread's time says nothing of what others did for it
        rounds = [{size: once(size) for size in SIZES} for _ in range(9)]
    return {size: 1000 * min(one[size] for one in rounds) for size in SIZES}


def choose(replayed: ReplayedShape | None = None) -> DraftShape:
    """The shape for this machine and a drafter; compiles the kernels first if need be."""
    native.library()
    return best(measured(), replayed)
