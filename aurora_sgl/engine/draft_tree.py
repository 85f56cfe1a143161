"""What a verify step leaves behind: the drafts of a batch as trees, and what was accepted of them.

Made right after the verify forward, it only holds references (on a GPU, copies into pinned memory
on their way), so that nothing here waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from aurora_sgl import wire
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.engine.tree_choice import Grown


@dataclass(slots=True)
class VerifyObservation:
    """What one verify step leaves behind: CPU tensors, or pinned copies on their way."""

    draft_token: torch.Tensor  # [batch, nodes]
    first_child: torch.Tensor  # [batch, nodes]
    next_sibling: torch.Tensor  # [batch, nodes]
    accept_index: torch.Tensor  # [batch, depth + 1] rows of the flattened batch, -1 padded
    target_predict: torch.Tensor | None  # [batch, nodes]; None when the batch was sampled
    shape: DraftShape
    version_id: int
    swap_count: int
    swap_age: int
    rule: str  # by which drafts of sampled requests are accepted, see ``wire.VerifyStep``
    keeps_kv: bool = False  # a step without drafts that computed their KV all the same
    grown: Grown | None = None  # of a tree that was grown as far as it paid
    aux: torch.Tensor | None = None  # [batch * nodes, width], accepted path in front
    last: torch.Tensor | None = None  # [batch * nodes, hidden], node order
    #: Row of the batch -> block of ``aux`` and ``last`` where they hold only some requests.
    blocks: dict[int, int] | None = None

    def block(self, row: int) -> int:
        return row if self.blocks is None else self.blocks[row]


@dataclass(slots=True)
class StepRows:
    """One verify step as lists, a row for each request of the batch."""

    observation: VerifyObservation
    accept_lens: list[int]
    batch_size: int
    at_us: int = field(default_factory=wire.now_us)
    draft_token: list[list[int]] = field(init=False)
    first_child: list[list[int]] = field(init=False)
    next_sibling: list[list[int]] = field(init=False)
    paths: list[list[int]] = field(init=False)
    target_predict: list[list[int]] | None = field(init=False)

    def __post_init__(self) -> None:
        observation = self.observation
        self.draft_token = observation.draft_token.tolist()
        self.first_child = observation.first_child.tolist()
        self.next_sibling = observation.next_sibling.tolist()
        self.paths = observation.accept_index.tolist()
        self.target_predict = (
            observation.target_predict.tolist() if observation.target_predict is not None else None
        )


def parents_from_links(first_child: list[int], next_sibling: list[int]) -> list[int]:
    """Parent node of node 1..nodes-1 of one request; -1 for a node that hangs on nothing."""
    parents = [-1] * len(first_child)
    for parent, child in enumerate(first_child):
        while child != -1:
            parents[child] = parent
            child = next_sibling[child]
    return parents[1:]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself on CPU; on a GPU a pinned copy that is filled asynchronously. It is
    complete once the step's own copies are, which SGLang waits for before it reads results."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def rows_to_host(tensor: torch.Tensor, parts: list[tuple[int, int]]) -> torch.Tensor:
    """On CPU the tensor itself. From a GPU only these parts, each (first row, rows), in order."""
    if tensor.device.type == "cpu":
        return tensor
    return to_host(torch.cat([tensor[first : first + rows] for first, rows in parts]))
