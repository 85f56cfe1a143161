"""One served request as training and replay see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from aurora_sgl.errors import AuroraError

if TYPE_CHECKING:  # for names in signatures alone: scheduler and sidecar start without PyTorch
    import torch


@dataclass(frozen=True)
class LoggedProposal:
    """One draft without its root. ``tokens[i]`` is node i + 1, ``parents[i]`` its parent's number,
    as a server records it; ``root`` is the position of the bonus token, node 0."""

    root: int
    tokens: list[int]  # target ids
    parents: list[int]
    accepted: int
    version_id: int = 0


@dataclass(frozen=True)
class TargetSampling:
    """How the target's distribution was sampled. ``top_k`` 0: from all tokens."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        assert self.temperature > 0 and self.top_k >= 0


@dataclass(frozen=True)
class Sequence:
    """Tokens of a request from position 0, with the target's features of all but the last ones.

    Features start at position 0: a prefix that came from the cache is already filled in.
    """

    request_id: int
    tokens: torch.Tensor  # [T] int64, prompt and output
    features: torch.Tensor  # [n, feature_width], what the drafter's rows take
    last: torch.Tensor  # [n, H]: the target's normed last hidden state; logits = last @ lm_head.T
    output_start: int  # position of the first output token
    greedy: bool = True
    constrained: bool = False  # by a grammar or a bias: its tokens need not be the target's best
    domain: str = "default"
    conversation: str = ""  # requests of one conversation, or one prompt, share it
    accept_rule: str = ""  # see RecentRequest; "": not known
    sampling: TargetSampling | None = None  # None: greedy, or not known
    proposals: tuple[LoggedProposal, ...] = ()  # what servers drafted, where the store knows it
    weights: torch.Tensor | None = None  # [rows] float32: how much a base row counts; None: 1
    train_from: int = 0  # first base row that is trained on here, see ``shared_prefixes``

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 1 and self.features.ndim == 2
        assert 0 < self.output_start < len(self.tokens)
        assert self.output_start <= self.rows, "features must cover the prompt"

    def to(self, device: torch.device) -> Sequence:
        """The same request with its tensors on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "features", "last")}
        return replace(self, **moved)

    @property
    def rows(self) -> int:
        """Drafter rows that the features allow: row i takes feature i and token i + 1."""
        return min(len(self.features), len(self.tokens) - 1)


class Sequences(Protocol):
    """Requests, loaded one at a time; indexing raises ``AuroraError`` when a file went or broke."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sequence: ...


def readable(sequences: Sequences) -> Iterator[Sequence]:
    """All but those whose file went (the byte budget takes old ones) or broke meanwhile."""
    for index in range(len(sequences)):
        with suppress(AuroraError):
            yield sequences[index]
