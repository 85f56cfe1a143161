"""How deep and how wide to draft on this CPU: what a shape brings against what it costs here.

Verifying more tokens costs what a few more rows add to a linear layer: next to nothing where
reading the weights takes longest, as much again where the processor has no bfloat16. That is timed
at start. Another step of the drafter adds a fixed part. What a shape brings differs by drafter; the
figures are exact replays of one that had learnt from 72 requests of the demo (SmolLM2-135M).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from aurora_sgl.engine.cpu import linear, native
from aurora_sgl.engine.cpu.packed import pack

#: Of a target's step for one token: a step of an EAGLE3 drafter, and the step that extends its
#: cache by what was accepted (measured on SmolLM2-135M with 8,192 draft tokens).
_DRAFT_STEP, _DRAFT_EXTEND = 0.08, 0.10


@dataclass(frozen=True)
class Shape:
    """SGLang's ``--speculative-num-steps``, ``-eagle-topk`` and ``-num-draft-tokens``."""

    steps: int
    topk: int
    nodes: int

    @property
    def flags(self) -> dict[str, str]:
        return {
            "--speculative-num-steps": str(self.steps),
            "--speculative-eagle-topk": str(self.topk),
            "--speculative-num-draft-tokens": str(self.nodes),
        }


#: Accept lengths of one drafter by shape.
BRINGS = {
    Shape(1, 1, 2): 1.31,
    Shape(1, 3, 4): 1.45,
    Shape(2, 4, 4): 1.53,
    Shape(2, 4, 5): 1.58,
    Shape(2, 4, 6): 1.60,
    Shape(3, 4, 6): 1.63,
    Shape(3, 4, 8): 1.64,
}


SIZES = sorted({1, *(shape.nodes for shape in BRINGS)})
#: A drafter that learns on gains more from larger trees than ``BRINGS`` says: of shapes within this
#: share of the fastest the one that brings most is taken.
_NEAR = 0.95


def best(rows: dict[int, float]) -> Shape:
    """The shape that brings most tokens per second to one request alone.

    ``rows``: time of the target's step by its rows, in any unit, for all of ``SIZES``. With more
    requests at once each node costs more; the server then leaves drafts out where they lose.
    """

    def speed(shape: Shape) -> float:
        drafts = _DRAFT_STEP * (shape.steps - 1) + _DRAFT_EXTEND
        return BRINGS[shape] / (rows[shape.nodes] / rows[1] + drafts)

    fastest = max(map(speed, BRINGS))
    near = [shape for shape in BRINGS if speed(shape) >= _NEAR * fastest]
    return max(near, key=lambda shape: BRINGS[shape])


def measured() -> dict[int, float]:
    """Milliseconds of bfloat16 linear layers by rows, for ``SIZES``; takes about 0.4 s."""
    weights = [torch.full((1536, 1536), 0.5, dtype=torch.bfloat16) for _ in range(8)]
    packed = [pack(w) for w in weights] if linear.choose().few == linear.PACKED else []

    def once(rows: int) -> float:
        x = torch.full((rows, 1536), 0.5, dtype=torch.bfloat16)
        begun = time.thread_time()  # others may be running on this machine
        for at, weight in enumerate(weights):
            if packed:
                packed[at](x, None)
            elif linear.choose().few == linear.OWN:
                linear.own(x, weight, None)
            else:
                torch.nn.functional.linear(x, weight)
        return time.thread_time() - begun

    rounds = [{size: once(size) for size in SIZES} for _ in range(9)]
    return {size: 1000 * min(one[size] for one in rounds) for size in SIZES}


def choose() -> Shape:
    """The shape for this machine; compiles the kernels first if need be."""
    native.library()
    return best(measured())
