"""What a drafter is to the rest of the code: the protocol that each architecture fills in.

A drafter extends a text whose tokens and target's features are known. Parameters carry the names
of the checkpoints that SGLang loads. The embedding is the target's and never here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.packed import DraftedRows, Keep, PackedText
from aurora_sgl.drafter.target import TargetHead, TargetInfo


@dataclass(frozen=True)
class Draft:
    """A draft without its root: ``tokens[i]`` is node i + 1, ``parents[i]`` its parent's number.

    Node 0 is the root (the bonus token). Nodes are numbered as SGLang and our records do: a parent
    before its children.
    """

    tokens: list[int]  # target ids
    parents: list[int]


class Drafter(nn.Module, ABC):
    """One subclass an architecture, in a module of ``drafter/architectures/``."""

    #: ``architectures[0]`` of ``config.json``: the class that SGLang loads it with.
    architecture: ClassVar[str]
    #: SGLang's ``--speculative-algorithm``.
    algorithm: ClassVar[str]
    #: Whether its checkpoint holds an lm_head; else the target's serves it.
    has_own_head: ClassVar[bool]
    #: Whether it proposes from a part of the target's vocabulary (``d2t`` and ``t2d``, see
    #: ``drafter.vocabulary``), which follows traffic (``drafter.refresh``); then with its own head.
    has_draft_vocabulary: ClassVar[bool]

    #: Whether its checkpoint had neither of these maps, which its next one then has not either.
    without_maps: bool = False

    config: DrafterConfig
    lm_head: nn.Linear  # with its own head
    d2t: torch.Tensor  # [draft_vocab] int64: target id less draft id; with a draft vocabulary
    t2d: torch.Tensor  # [vocab] bool: whether a target id is in the draft vocabulary

    # -- config.json -------------------------------------------------------------------------

    @classmethod
    def check_json(cls, raw: Mapping[str, Any]) -> None:
        """Raises ``AuroraError`` for a ``config.json`` of a variant that is not supported."""

    @classmethod
    @abstractmethod
    def fields_from_json(cls, raw: Mapping[str, Any], target_layers: int) -> dict[str, Any]:
        """Fields of :class:`DrafterConfig` that only this architecture's ``config.json`` has.

        ``target_layers`` is 0 when the target is not known.
        """

    @classmethod
    @abstractmethod
    def fields_to_json(cls, config: DrafterConfig) -> dict[str, Any]:
        """The inverse: what ``config.json`` gets besides the shared keys."""

    @classmethod
    @abstractmethod
    def fields_for(cls, target: TargetInfo, draft_vocab_size: int) -> dict[str, Any]:
        """The same fields for a new drafter. Raises ``AuroraError`` for a target that can't have
        one."""

    @classmethod
    def target_problems(cls, config: DrafterConfig, target: TargetInfo) -> list[str]:
        """Why a drafter of the right widths still does not fit a target, one line a reason."""
        return []

    # -- what a trace holds for it -----------------------------------------------------------

    @classmethod
    @abstractmethod
    def features(
        cls,
        aux: torch.Tensor,  # [n, aux_width]: what SGLang handed to the served drafter
        last: torch.Tensor,  # [n, H]: the target's normed last hidden state
    ) -> torch.Tensor:  # [n, config.feature_width]
        """Which of a trace's tensors its rows take."""

    # -- tensors of its checkpoint -----------------------------------------------------------

    @classmethod
    @abstractmethod
    def parameter_name(cls, name: str) -> str | None:
        """Our name of a tensor by its canonical name (``checkpoint.canonical_name``); None for one
        that is the target's in serving."""

    @classmethod
    def has_written(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a checkpoint with tensors of these canonical names is one of this architecture.
        Asked where ``config.json`` names the target's class, as published drafters do."""
        return False

    @classmethod
    def left_out(
        cls,
        tensors: Mapping[str, torch.Tensor],  # by our names
        config: DrafterConfig,
    ) -> dict[str, torch.Tensor]:
        """Tensors that SGLang's model has and a checkpoint may leave out, as they are to be."""
        return {}

    @classmethod
    def complete(
        cls, tensors: dict[str, torch.Tensor], config: DrafterConfig
    ) -> dict[str, torch.Tensor]:
        """The tensors of a file by our names, with those that a checkpoint may leave out."""
        return tensors

    def after_load(self) -> None:
        """Called on a drafter whose tensors were put in place of empty ones."""

    # -- drafting ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    def target_ids(self) -> torch.Tensor:  # [draft_vocab] int64
        """Target token id of each draft token id."""
        if not self.has_draft_vocabulary:
            return torch.arange(self.config.vocab_size, device=self.device)
        return self.d2t + torch.arange(self.config.draft_vocab_size, device=self.d2t.device)

    @abstractmethod
    def unroll(
        self,
        text: PackedText,
        head: TargetHead,
        *,
        steps: int,
        keep: Keep | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[DraftedRows]:  # one a step, none for a step without rows
        """Training-time test: ``steps`` steps from all base rows of a pack, with gradients.

        Base row b knows its text up to token b + 1 and step k predicts token b + 2 + k, as in
        serving after k accepted drafts. Step k holds the base rows whose input token b + 1 + k is
        known (:meth:`BaseRows.after <aurora_sgl.drafter.packed.BaseRows.after>`), of these only
        those that ``keep`` chose after each step before. All on one device.
        """

    @abstractmethod
    def propose(
        self,
        tokens: torch.Tensor,  # [T] int64
        features: torch.Tensor,  # [n, feature_width]
        roots: torch.Tensor,  # [roots] int64 positions, each >= 1 and <= len(features)
        shape: DraftShape,
        head: TargetHead,
    ) -> list[Draft]:
        """The draft from each root (the position of the bonus token) as SGLang would make it."""

    def accepted(
        self,
        tokens: torch.Tensor,  # [T] int64
        features: torch.Tensor,  # [n, feature_width]
        roots: torch.Tensor,  # [roots] int64, as for ``propose``
        shape: DraftShape,
        head: TargetHead,
    ) -> torch.Tensor:  # [roots] int64
        """Drafts of a verify step from each root that a log of these tokens would accept."""
        log = tokens.tolist()
        drafts = self.propose(tokens, features, roots, shape, head)
        counts = [
            accepted_of(draft, log[root + 1 :])
            for root, draft in zip(roots.tolist(), drafts, strict=True)
        ]
        return torch.tensor(counts, dtype=torch.int64)


def accepted_of(draft: Draft, continuation: list[int]) -> int:
    """How many :func:`accepted_nodes` there are."""
    return len(accepted_nodes(draft, continuation))


def accepted_nodes(draft: Draft, continuation: list[int]) -> list[int]:
    """Nodes of a draft along the tokens that follow its root."""
    nodes: list[int] = []
    for token in continuation:
        above = nodes[-1] if nodes else 0
        children = (i for i, parent in enumerate(draft.parents, 1) if parent == above)
        node = next((i for i in children if draft.tokens[i - 1] == token), 0)
        if not node:
            break
        nodes.append(node)
    return nodes
