"""Patterns of attention that training and replay use, and the definition to hold kernels to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from aurora_sgl.drafter.attention import Seen

Pick = Callable[[torch.device], "torch.Tensor | Seen"]


@dataclass(frozen=True)
class Case:
    name: str
    queries: list[int]  # of each request
    texts: list[int]  # packed text rows of each request
    visible: list[torch.Tensor]  # bool [queries, texts] of each request
    seen: Pick  # what attend is given
    own: int = 0
    own_seen: torch.Tensor | None = None


def up_to(last: list[int], text: int) -> torch.Tensor:
    return torch.arange(text) <= torch.tensor(last)[:, None]


def tree_mask(text: int, parents: list[int]) -> torch.Tensor:
    """Nodes behind a text: each sees the text, its ancestors (-1: none) and itself."""
    mask = torch.zeros(len(parents), text + len(parents), dtype=torch.bool)
    mask[:, :text] = True
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] = mask[parent]
        mask[node, text + node] = True
    return mask


def cases() -> list[Case]:
    def rows(last: list[int]) -> Pick:
        return lambda device: torch.tensor(last, device=device)

    chain = list(range(4, 24))
    slots = [r for r in (2, 3, 7, 11, 12) for _ in range(4)]
    first, second = [5, 6, 7, 8], [0, 1, 2, 3, 4, 5]
    trees = [tree_mask(9, [-1, 0, 0, 1, 1, 2]), tree_mask(4, [-1, -1, 0, 1])]
    holes = torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    return [
        Case("causal", [21], [21], [up_to(list(range(21)), 21)], rows(list(range(21)))),
        Case("late rows of a text", [20], [27], [up_to(chain, 27)], rows(chain)),
        Case("unrolled", [20], [24], [up_to(chain, 24)], rows(chain), own=2),
        Case("beam slots", [20], [15], [up_to(slots, 15)], rows(slots), own=3),
        Case("some own rows", [20], [24], [up_to(chain, 24)], rows(chain), 3, holes),
        Case("trees", [6, 4], [15, 8], trees, lambda d: Seen.masks([t.to(d) for t in trees])),
        Case(
            "packed",
            [7, 1, 12],
            [7, 5, 14],
            [up_to(list(range(7)), 7), up_to([4], 5), up_to(list(range(2, 14)), 14)],
            lambda d: Seen.run([0, 4, 2], [7, 1, 12]),
            own=1,
        ),
        Case(
            "packed, unrolled short of the texts' ends",
            [4, 6],
            [12, 8],
            [up_to(first, 12), up_to(second, 8)],
            lambda d: Seen.up_to(torch.tensor(first + second, device=d), [4, 6], [12, 8]),
            own=2,
        ),
        Case(
            "packed beam slots",
            [4, 3],
            [9, 6],
            [up_to([3, 3, 6, 6], 9), up_to([5, 5, 5], 6)],
            lambda d: Seen.up_to(torch.tensor([3, 3, 6, 6, 5, 5, 5], device=d), [4, 3], [9, 6]),
            own=1,
        ),
    ]


@dataclass(frozen=True)
class Given:
    """Random tensors of a case, and a random gradient of the output."""

    tensors: list[torch.Tensor]  # query, text key and value; own key and value
    grad: torch.Tensor
    own_seen: torch.Tensor | None

    def to(self, dtype: torch.dtype, device: torch.device) -> Given:
        moved = [x.detach().to(device, dtype).requires_grad_(True) for x in self.tensors]
        seen = None if self.own_seen is None else self.own_seen.to(device)
        return Given(moved, self.grad.to(device, dtype), seen)


def given(case: Case, *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Given:
    """Made in ``dtype`` and widened to float64, so that rounding the inputs is no error."""
    generator = torch.Generator().manual_seed(len(case.name))
    queries, texts = sum(case.queries), sum(case.texts)
    shapes: list[tuple[int, ...]] = [(queries, heads), (texts, kv_heads), (texts, kv_heads)]
    shapes += [(queries, case.own, kv_heads)] * (2 if case.own else 0)
    made = [
        torch.randn(*shape, head_dim, generator=generator, dtype=torch.float64).to(dtype).double()
        for shape in [*shapes, (queries, heads)]
    ]
    return Given([x.requires_grad_(True) for x in made[:-1]], made[-1], case.own_seen)


def define(case: Case, inputs: Given) -> torch.Tensor:
    """Softmax attention, one query and one head at a time."""
    query, key, value, *own = inputs.tensors
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[2]
    outs = []
    at = begin = 0
    for count, text, visible in zip(case.queries, case.texts, case.visible, strict=True):
        for i in range(count):
            rows = begin + visible[i].nonzero()[:, 0]
            keys, values = key[rows], value[rows]
            if own:
                kept = slice(None) if case.own_seen is None else case.own_seen[at + i]
                keys = torch.cat((keys, own[0][at + i][kept]))
                values = torch.cat((values, own[1][at + i][kept]))
            for head in range(heads):
                of = head // (heads // kv_heads)
                weights = (keys[:, of] @ query[at + i, head] / head_dim**0.5).softmax(0)
                outs.append(weights @ values[:, of])
        at, begin = at + count, begin + text
    return torch.stack(outs).view(query.shape)


def answers(out: torch.Tensor, inputs: Given) -> list[torch.Tensor]:
    """The output and the gradients of all inputs."""
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.grad)]


def relative_errors(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [
        float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm())
        for a, b in zip(ours, exact, strict=True)
    ]
