"""Several requests behind each other, without padding: one program however many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from aurora_sgl.drafter.attention import Seen


@dataclass(frozen=True)
class PackedText:
    """Tokens and features of requests, and the base rows from which each is drafted.

    Request r has ``token_counts[r]`` tokens and ``row_counts[r]`` text rows, both from its position
    0; its base rows are ``firsts[r] .. row_counts[r] - 1``. The lengths are known on the host.
    """

    tokens: torch.Tensor  # [T] int64
    features: torch.Tensor  # [n, feature_width]
    token_counts: tuple[int, ...]
    row_counts: tuple[int, ...]
    firsts: tuple[int, ...]

    @classmethod
    def of(
        cls,
        texts: Sequence[tuple[torch.Tensor, torch.Tensor]],  # tokens [T] and features [n, width]
        spans: Sequence[tuple[int, int]],  # first base row, and the one behind the last
    ) -> PackedText:
        """Features behind the last base row are left out. All tensors on one device."""
        rows = [
            min(len(features), len(tokens) - 1, last)
            for (tokens, features), (_, last) in zip(texts, spans, strict=True)
        ]
        return cls(
            torch.cat([tokens for tokens, _ in texts]),
            torch.cat([features[:n] for (_, features), n in zip(texts, rows, strict=True)]),
            tuple(len(tokens) for tokens, _ in texts),
            tuple(rows),
            tuple(first for first, _ in spans),
        )

    @property
    def positions(self) -> torch.Tensor:  # [n] int64, on the device
        """Of each text row in its own request."""
        return torch.cat([torch.arange(n) for n in self.row_counts]).to(self.tokens.device)

    @property
    def next_tokens(self) -> torch.Tensor:  # [n] int64, on the device
        """Where in ``tokens`` the token behind each text row is."""
        begins = [
            end - count
            for end, count in zip(accumulate(self.token_counts), self.token_counts, strict=True)
        ]
        parts = [
            torch.arange(begin + 1, begin + 1 + rows)
            for begin, rows in zip(begins, self.row_counts, strict=True)
        ]
        return torch.cat(parts).to(self.tokens.device)

    def base(self) -> BaseRows:
        """All base rows, request by request."""
        counts = [max(0, n - f) for n, f in zip(self.row_counts, self.firsts, strict=True)]
        position = torch.cat(
            [torch.arange(f, f + c) for f, c in zip(self.firsts, counts, strict=True)]
        )
        request = torch.repeat_interleave(torch.tensor(counts))
        return BaseRows(self, request, position, torch.arange(len(position)))


@dataclass(frozen=True)
class BaseRows:
    """Base rows that are still drafted from, in order. These tensors are on the host: what is
    computed has sizes that follow from them."""

    text: PackedText
    request: torch.Tensor  # [rows] int64
    position: torch.Tensor  # [rows] int64: b, in its own request
    number: torch.Tensor  # [rows] int64: place among all base rows of the pack

    def __len__(self) -> int:
        return len(self.number)

    @property
    def counts(self) -> list[int]:
        """Rows of each request."""
        return torch.bincount(self.request, minlength=len(self.text.firsts)).tolist()

    @property
    def rows(self) -> torch.Tensor:  # [rows] int64, on the device
        """Where in ``features`` each base row is."""
        return self._packed(self.text.row_counts)

    @property
    def tokens(self) -> torch.Tensor:  # [rows] int64, on the device
        """Where in ``tokens`` the token of each base row is."""
        return self._packed(self.text.token_counts)

    def after(
        self,
        step: int,
        kept: torch.Tensor | None = None,  # [rows] bool, on any device; None: all
    ) -> tuple[BaseRows, torch.Tensor]:
        """The rows that step ``step`` computes, and their places among these [rows], on the device.

        Those that are kept and whose input token, ``position + 1 + step``, is known.
        """
        known_tokens = torch.tensor(self.text.token_counts)[self.request]
        goes_on = self.position + 1 + step < known_tokens
        if kept is not None:
            goes_on &= kept.cpu()
        places = goes_on.nonzero().squeeze(1)
        rows = BaseRows(self.text, self.request[places], self.position[places], self.number[places])
        return rows, places.to(self.text.tokens.device)

    def visibility(self) -> Seen:
        """Each row sees the text of its own request up to itself."""
        device = self.text.tokens.device
        return Seen.up_to(self.position, self.counts, self.text.row_counts, device)

    def _packed(self, counts: tuple[int, ...]) -> torch.Tensor:
        offsets = torch.tensor((0, *accumulate(counts)))
        return (offsets[self.request] + self.position).to(self.text.tokens.device)


@dataclass(frozen=True)
class DraftedRows:
    """One unrolled step."""

    logits: torch.Tensor  # [rows, draft_vocab] float32, with gradients
    base: BaseRows
    #: [rows] int64, on the device: the same rows in the step before; None in the first step.
    parent: torch.Tensor | None = None


#: Which rows of a step [rows] bool the next one computes, by the step's number.
Keep = Callable[[int, DraftedRows], torch.Tensor]
