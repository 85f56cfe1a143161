"""Served requests as training sequences: chosen, split, made whole, and streamed from files."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.queries import RecentRequest
from aurora_sgl.training.prefixes import Locate, Piece, Prefixes
from aurora_sgl.training.sequence import Sequence
from aurora_sgl.training.splits import is_plain, split_of
from aurora_sgl.training.traces import Trace, read_trace

_CACHE_BYTES = 256 * 1024**2
_FEWEST_OUTPUT = 3  # fewer output tokens hold nothing to predict


class Loader:
    """Reads sequences from trace files and keeps the last used ones, up to a byte budget."""

    def __init__(self, config: DrafterConfig, locate: Locate, cache_bytes: int = _CACHE_BYTES):
        self.config, self.locate, self.cache_bytes = config, locate, cache_bytes
        self.cache: OrderedDict[int, Sequence] = OrderedDict()
        self.held = 0

    def load(self, row: RecentRequest, pieces: tuple[Piece, ...]) -> Sequence:
        """Raises ``AuroraError`` when a file is missing, broken or of another drafter's width."""
        if row.request_id in self.cache:
            self.cache.move_to_end(row.request_id)
            return self.cache[row.request_id]
        sequence = self._read(row, pieces)
        self.cache[row.request_id] = sequence
        self.held += _size(sequence)
        while self.held > self.cache_bytes and len(self.cache) > 1:
            _, old = self.cache.popitem(last=False)
            self.held -= _size(old)
        return sequence

    def _read(self, row: RecentRequest, pieces: tuple[Piece, ...]) -> Sequence:
        features, last = [], []
        own: Trace | None = None
        for piece in pieces:
            trace = read_trace(self.locate(piece.uri), start=piece.start)
            if trace.end < piece.end:
                raise AuroraError(f"the trace of request {row.request_id} ends too early")
            part = slice(piece.begin - piece.start, piece.end - piece.start)
            taken = trace.aux if self.config.is_eagle3 else trace.last
            features.append(taken[part])
            last.append(trace.last[part])
            own = trace
        assert own is not None
        width = features[0].shape[-1]
        if width != self.config.feature_width:
            raise AuroraError(
                f"features of width {width}, the drafter takes {self.config.feature_width}"
            )
        return Sequence(
            request_id=row.request_id,
            tokens=own.tokens,
            features=torch.cat(features),
            last=torch.cat(last),
            output_start=row.output_start,
            greedy=row.greedy,
            domain=row.domain,
            conversation=split_key(row),
        )


@dataclass
class SequenceSet:
    """Requests of one split. Indexing reads a file, or finds it in the loader's cache."""

    loader: Loader
    items: list[tuple[RecentRequest, tuple[Piece, ...]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sequence:
        return self.loader.load(*self.items[index])

    def __iter__(self) -> Iterator[Sequence]:
        return (self[index] for index in range(len(self)))

    def readable(self) -> Iterator[Sequence]:
        """All but those whose file went (the byte budget takes old ones) or broke meanwhile."""
        for index in range(len(self)):
            with suppress(AuroraError):
                yield self[index]

    @property
    def output_tokens(self) -> int:
        return sum(row.completion_tokens for row, _ in self.items)


@dataclass
class Dataset:
    """Three disjoint splits, and why requests were left out (reason to count)."""

    train: SequenceSet
    dev: SequenceSet
    gate: SequenceSet
    left_out: Counter[str]


def split_key(row: RecentRequest) -> str:
    return row.conversation_hash or row.prompt_sha256


def build(
    rows: Iterable[RecentRequest],
    locate: Locate,
    config: DrafterConfig,
    *,
    dev_share: float,
    gate_share: float,
    donors: Iterable[RecentRequest] = (),
    cache_bytes: int = _CACHE_BYTES,
) -> Dataset:
    """Choose and split requests. Only tokens are read here; features when a request is used.

    ``donors`` are further traces that may fill a cached prefix. Left out are requests with
    penalties, bias or a grammar (``sampling``), with hardly an answer (``short``), whose cached
    prefix no trace holds (``prefix``), or whose file is missing or broken (``broken``).
    """
    rows = list(rows)
    known = {row.request_id for row in rows}
    prefixes = Prefixes([*rows, *(d for d in donors if d.request_id not in known)], locate)
    loader = Loader(config, locate, cache_bytes)
    data = Dataset(SequenceSet(loader), SequenceSet(loader), SequenceSet(loader), Counter())
    for row in rows:
        reason, pieces = _check(row, prefixes)
        if pieces is None:
            data.left_out[reason] += 1
            continue
        side = split_of(split_key(row), dev_share=dev_share, gate_share=gate_share)
        {"train": data.train, "dev": data.dev, "gate": data.gate}[side].items.append((row, pieces))
    return data


def _check(row: RecentRequest, prefixes: Prefixes) -> tuple[str, tuple[Piece, ...] | None]:
    if not is_plain(row.sampling):
        return "sampling", None
    if row.end - row.output_start + 1 < _FEWEST_OUTPUT:
        return "short", None
    try:
        if not prefixes.locate(row.uri).exists():
            return "broken", None
        return "prefix", prefixes.pieces(row)
    except AuroraError:
        return "broken", None


def _size(sequence: Sequence) -> int:
    tensors = (sequence.tokens, sequence.features, sequence.last)
    return sum(t.numel() * t.element_size() for t in tensors)
