"""Which text rows each query sees, for one request or for several packed behind each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

#: Queries, text rows, and who sees what (``None``: causal).
Request = tuple[slice, slice, torch.Tensor | None]


@dataclass(frozen=True)
class Block:
    """Queries of one request that are computed together, and the text rows that they reach."""

    queries: slice
    text: slice
    hidden: torch.Tensor  # [queries, n] bool: which of the last n rows a query does not see

    @property
    def tail(self) -> slice:
        """The last n of the block's text rows; every query sees the rows before them."""
        length = self.text.stop - self.text.start
        return slice(length - self.hidden.shape[1], length)


@dataclass(frozen=True)
class Seen:
    """Made by :meth:`run`, :meth:`up_to` or :meth:`masks`; the lengths are known on the host.

    Packed request r owns the queries ``query_indptr[r] .. query_indptr[r + 1] - 1`` and likewise
    its text rows, after :meth:`pick`. Without a mask it is *causal*, aligned at the end: query i of
    q sees the rows 0 .. t - q + i of the t rows of its request. Each query sees at least one row.
    """

    query_indptr: tuple[int, ...]
    text_indptr: tuple[int, ...]
    mask: torch.Tensor | None = None  # bool, the [q, t] of each request flattened, end to end
    rows: torch.Tensor | int | None = None  # what pick takes: an index, the first ones, or all

    @classmethod
    def run(
        cls, firsts: Sequence[int], counts: Sequence[int], texts: Sequence[int] | None = None
    ) -> Seen:
        """Query i of request r sees the rows ``0 .. firsts[r] + i`` of its text.

        ``counts`` are the queries of each request (one without any has no part in it), ``texts``
        the rows of its text as they are packed (default: just as many as its last query sees).
        Needs nothing from the device.
        """
        assert all(first >= 0 for first in firsts) and all(count >= 0 for count in counts)
        reached = [
            first + count if count else 0 for first, count in zip(firsts, counts, strict=True)
        ]
        rows = _reached_rows(reached, texts)
        return cls(_indptr(filter(None, counts)), _indptr(filter(None, reached)), None, rows)

    @classmethod
    def up_to(
        cls,
        last_row: torch.Tensor,  # [queries] int64, counted from the start of a query's own text
        counts: Sequence[int] | None = None,  # queries of each request; default: one request
        texts: Sequence[int] | None = None,  # packed text rows of each request
        device: torch.device | None = None,  # of a mask; default: last_row's
    ) -> Seen:
        """Each query sees the rows ``0 .. last_row`` of its text.

        Rows that go up by one from query to query become a :meth:`run`. Reads ``last_row`` on the
        host: one synchronisation when it is on a GPU, which :meth:`run` saves.
        """
        parts = torch.split(last_row.cpu(), list(counts or [len(last_row)]))
        if all(bool((part.diff() == 1).all()) for part in parts):
            firsts = [int(part[0]) if len(part) else 0 for part in parts]
            return cls.run(firsts, [len(part) for part in parts], texts)
        reached = [int(part.max()) + 1 if len(part) else 0 for part in parts]
        masks = [
            torch.arange(rows) <= part[:, None]
            for rows, part in zip(reached, parts, strict=True)
            if rows
        ]
        pattern = cls.masks([mask.to(device or last_row.device) for mask in masks])
        return cls(
            pattern.query_indptr, pattern.text_indptr, pattern.mask, _reached_rows(reached, texts)
        )

    @classmethod
    def masks(cls, masks: Sequence[torch.Tensor]) -> Seen:
        """Any pattern: a bool [queries, text rows] for each request, True where a row is seen.

        A tree is one: its text rows followed by its nodes, where a node sees the text, its
        ancestors and itself.
        """
        flat = torch.cat([mask.flatten() for mask in masks])
        return cls(_indptr([len(m) for m in masks]), _indptr([m.shape[1] for m in masks]), flat)

    @property
    def queries(self) -> int:
        return self.query_indptr[-1]

    @property
    def text(self) -> int:
        """Text rows after :meth:`pick`."""
        return self.text_indptr[-1]

    def pick(self, packed: torch.Tensor) -> torch.Tensor:
        """The rows of the packed text that are seen at all."""
        if isinstance(self.rows, torch.Tensor):
            return packed.index_select(0, self.rows.to(packed.device))
        return packed[: self.rows]

    def requests(self) -> Iterator[Request]:
        """(queries, text rows, mask or ``None`` for causal) of each request."""
        begin = 0
        for number in range(len(self.query_indptr) - 1):
            queries = slice(*self.query_indptr[number : number + 2])
            text = slice(*self.text_indptr[number : number + 2])
            shape = (queries.stop - queries.start, text.stop - text.start)
            mask = None
            if self.mask is not None:
                end = begin + shape[0] * shape[1]
                mask, begin = self.mask[begin:end].view(shape), end
            yield queries, text, mask

    def blocks(
        self, scores: int, rows: int, device: torch.device, shared: bool | None = None
    ) -> Iterator[Block]:
        """Blocks of at most ``rows`` queries and about ``scores`` pairs of query and row.

        ``shared``: short requests share a block, each blind to the others. Default: on a GPU, where
        a launch costs more than pairs that are computed for nothing.
        """
        shared = device.type != "cpu" if shared is None else shared
        single = ([request] for request in self.requests())
        groups = self.groups(scores, rows) if shared else single
        for group in groups:
            if len(group) == 1:
                yield from _blocks_of(*group[0], scores, rows, device)
                continue
            masks = [_as_mask(*request, device) for request in group]
            hidden = ~torch.block_diag(*masks)  # type: ignore[no-untyped-call]
            (first, first_text, _), (last, last_text, _) = group[0], group[-1]
            queries, text = slice(first.start, last.stop), slice(first_text.start, last_text.stop)
            yield Block(queries, text, hidden)

    def groups(self, scores: int, rows: int) -> list[list[Request]]:
        """Neighbours that fit into one block together, all their pairs counted."""
        groups: list[list[Request]] = []
        for request in self.requests():
            first = groups[-1][0] if groups else request
            queries, text = request[0].stop - first[0].start, request[1].stop - first[1].start
            if groups and queries <= rows and queries * text <= scores:
                groups[-1].append(request)
            else:
                groups.append([request])
        return groups


def _blocks_of(
    queries: slice,
    text: slice,
    mask: torch.Tensor | None,
    scores: int,
    rows: int,
    device: torch.device,
) -> Iterator[Block]:
    size = max(1, min(rows, scores // max(1, text.stop - text.start)))
    for begin in range(queries.start, queries.stop, size):
        end = min(begin + size, queries.stop)
        if mask is not None:
            hidden = ~mask[begin - queries.start : end - queries.start]
            yield Block(slice(begin, end), text, hidden)
            continue
        later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=device)
        reached = slice(text.start, text.stop - (queries.stop - end))
        yield Block(slice(begin, end), reached, later.triu(1))


def _as_mask(
    queries: slice, text: slice, mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:  # [queries, text] bool
    if mask is not None:
        return mask
    count, length = queries.stop - queries.start, text.stop - text.start
    row = torch.arange(length, device=device)
    return row <= torch.arange(length - count, length, device=device)[:, None]


def _indptr(lengths: Iterable[int]) -> tuple[int, ...]:
    return (0, *accumulate(lengths))


def _reached_rows(reached: Sequence[int], texts: Sequence[int] | None) -> torch.Tensor | int:
    if texts is None or list(texts) == list(reached):
        return sum(reached)
    assert len(texts) == len(reached), (len(texts), len(reached))
    assert all(have >= need for have, need in zip(texts, reached, strict=True)), (texts, reached)
    begins = _indptr(texts)[:-1]
    return torch.cat(
        [torch.arange(begin, begin + need) for begin, need in zip(begins, reached, strict=True)]
    )
