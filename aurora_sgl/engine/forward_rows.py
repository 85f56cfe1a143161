"""Rows of hidden states on their way from a forward to the ring, and how they are copied.

The scheduler makes one item per step or prefill, which only refers to tensors; the copier makes
messages of it. NumPy copies without the interpreter lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from aurora_sgl import wire
from aurora_sgl.engine.draft_tree import StepRows
from aurora_sgl.engine.trace_budget import OpenTrace


@dataclass(frozen=True, slots=True)
class Layout:
    """Of the rows of a boot. Widths in elements."""

    dtype: str
    aux_width: int
    last_width: int
    item_bytes: int

    @property
    def aux_bytes(self) -> int:
        return self.aux_width * self.item_bytes

    @property
    def last_bytes(self) -> int:
        return self.last_width * self.item_bytes

    @property
    def row_bytes(self) -> int:
        return self.aux_bytes + self.last_bytes


@dataclass(slots=True)
class Span:
    """Rows of one request: those numbered ``aux`` and ``last`` of the item's tensors."""

    trace: OpenTrace
    start: int  # absolute position of the first row
    tokens: Sequence[int]  # one for each row
    aux: Sequence[int]
    last: Sequence[int]
    is_step: bool


@dataclass(slots=True)
class ForwardRows:
    """What one prefill or one step leaves behind for all traced requests of its batch."""

    layout: Layout
    aux: torch.Tensor  # [rows, aux_width] on CPU
    last: torch.Tensor | None  # [rows, last_width] on CPU
    spans: list[Span] = field(default_factory=list)
    #: Of a step, in as few words as the scheduler's thread can say it: (trace, row of the batch,
    #: position, tokens) of each request.
    marks: list[tuple[OpenTrace, int, int, Sequence[int]]] = field(default_factory=list)
    step: StepRows | None = None

    @property
    def traces(self) -> set[OpenTrace]:
        return {span.trace for span in self.spans} | {mark[0] for mark in self.marks}

    def all_spans(self) -> list[Span]:
        """Of the step too: the root and the accepted drafts, whose auxiliary rows are in front of
        those of their request, and whose last states lie where their nodes are."""
        if self.step is None:
            return self.spans
        observation, paths = self.step.observation, self.step.paths
        nodes = observation.shape.nodes
        spans = [*self.spans]
        for trace, row, start, tokens in self.marks:
            count, path = len(tokens), paths[row]
            first = observation.block(row) * nodes
            last = path[:count]
            if observation.blocks is not None:
                last = [node - row * nodes + first for node in last]
            spans.append(Span(trace, start, tokens, range(first, first + count), last, True))
        return spans

    @property
    def held(self) -> int:
        """Bytes of memory that are kept by it: those of whole forwards, not of these rows."""
        aux = self.aux.untyped_storage()
        last = self.last.untyped_storage() if self.last is not None else aux
        both = last.data_ptr() != aux.data_ptr()
        return aux.nbytes() + (last.nbytes() if both else 0)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens without rows: a whole prompt, or (``final``) the whole answer."""

    layout: Layout
    trace: OpenTrace
    start: int
    tokens: Sequence[int]
    final: bool = False


@dataclass(frozen=True, slots=True)
class GivenUp:
    trace: OpenTrace


Item = ForwardRows | Tokens | GivenUp


@dataclass(slots=True)
class Message:
    """What the sidecar is told at once: rows of some requests, or tokens without rows."""

    layout: Layout
    spans: list[Span]
    tokens: Tokens | None = None
    source: ForwardRows | None = None
    data: NDArray[np.uint8] | None = None  # the rows, once they are kept
    since: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        return sum(len(span.tokens) for span in self.spans)

    @property
    def bytes(self) -> int:
        return self.rows * self.layout.row_bytes

    @property
    def traces(self) -> set[OpenTrace]:
        spans = {span.trace for span in self.spans}
        return spans if self.tokens is None else spans | {self.tokens.trace}

    def write(self, target: NDArray[np.uint8]) -> None:
        """The auxiliary rows of all spans, then their last states. ``target``: [bytes]."""
        if self.data is not None:
            np.copyto(target, self.data)
            return
        assert self.source is not None
        rows, layout = self.rows, self.layout
        middle = rows * layout.aux_bytes
        aux = target[:middle].reshape(rows, layout.aux_bytes)
        _gather(self.source.aux, [span.aux for span in self.spans], aux)
        if self.source.last is not None and layout.last_width:
            last = target[middle:].reshape(rows, layout.last_bytes)
            _gather(self.source.last, [span.last for span in self.spans], last)

    def keep(self) -> None:
        """Copy the rows to memory of our own, so that those of the whole forward can go."""
        if self.spans and self.data is None:
            data = np.empty(self.bytes, np.uint8)
            self.write(data)
            self.data, self.source = data, None

    def headers(self, boot_id: int, position: int) -> list[wire.TraceHeader]:
        """Of what is still wanted, for rows that begin at this position of the ring."""
        layout = self.layout
        if self.tokens is not None:
            one = self.tokens
            header = _header(boot_id, layout, one.trace, one.start, list(one.tokens), one.final)
            return [] if one.trace.broken else [header]
        headers = []
        aux_at, last_at = position, position + self.rows * layout.aux_bytes
        for span in self.spans:
            tokens = list(span.tokens)
            aux_bytes, last_bytes = len(tokens) * layout.aux_bytes, len(tokens) * layout.last_bytes
            if not span.trace.broken:
                steps = [span.start] if span.is_step else []
                places = (aux_at, aux_bytes, last_at, last_bytes)
                headers.append(
                    _header(
                        boot_id, layout, span.trace, span.start, tokens, False, steps, places
                    )
                )  # fmt: skip
            aux_at += aux_bytes
            last_at += last_bytes
        return headers


def messages(item: ForwardRows | Tokens, most_bytes: int) -> Iterator[Message]:
    """An item in order, in messages of at most about ``most_bytes``."""
    if isinstance(item, Tokens):
        yield Message(item.layout, [], tokens=item)
        return
    most = max(1, most_bytes // item.layout.row_bytes)
    for group in _groups(item, most):
        spans = [span for span in group if not span.trace.broken]
        if spans:
            yield Message(item.layout, spans, source=item)


def _groups(item: ForwardRows, most: int) -> Iterator[list[Span]]:
    """The spans of an item in order, in groups of at most ``most`` rows; long ones are cut."""
    group: list[Span] = []
    rows = 0
    for whole in item.all_spans():
        for first in range(0, len(whole.tokens), most):
            span = _part(whole, first, most) if len(whole.tokens) > most else whole
            if rows + len(span.tokens) > most and group:
                yield group
                group, rows = [], 0
            group.append(span)
            rows += len(span.tokens)
    if group:
        yield group


def _part(span: Span, first: int, count: int) -> Span:
    part = slice(first, first + count)
    return Span(
        span.trace, span.start + first, span.tokens[part], span.aux[part], span.last[part],
        span.is_step and first == 0,
    )  # fmt: skip


def _gather(source: torch.Tensor, rows: list[Sequence[int]], target: NDArray[np.uint8]) -> None:
    """Copy rows of a tensor, without the interpreter lock. ``target``: [rows, bytes]."""
    raw = source.contiguous().view(torch.uint8).numpy()
    done = 0
    if all(isinstance(part, range) for part in rows) and len(rows) * 16 < len(target):
        for part in rows:
            np.copyto(target[done : done + len(part)], raw[part[0] : part[-1] + 1])
            done += len(part)
        return
    numbers = np.fromiter((row for part in rows for row in part), np.intp, len(target))
    if numbers.min() < 0 or numbers.max() >= len(raw):
        raise IndexError("rows that the forward did not have")
    np.take(raw, numbers, axis=0, out=target, mode="clip")  # "raise" would buffer it


def _header(
    boot_id: int,
    layout: Layout,
    trace: OpenTrace,
    start: int,
    tokens: list[int],
    final: bool,
    steps: Sequence[int] = (),
    places: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> wire.TraceHeader:
    aux_at, aux_bytes, last_at, last_bytes = places
    return wire.TraceHeader(
        boot_id=boot_id,
        request_id=trace.request_id,
        start=start,
        tokens=tokens,
        dtype=layout.dtype,
        aux_width=layout.aux_width,
        last_width=layout.last_width,
        final=final,
        output_start=trace.output_start,
        greedy=trace.greedy,
        step_starts=list(steps),
        aux_at=aux_at,
        aux_bytes=aux_bytes,
        last_at=last_at,
        last_bytes=last_bytes,
    )
