"""Served requests as training sequences: chosen, split, made whole, and streamed from files."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aurora_sgl.drafter import architectures
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.errors import AuroraError
from aurora_sgl.sequences.near_duplicates import near_duplicates
from aurora_sgl.sequences.prefixes import Locate, Piece, Prefixes
from aurora_sgl.sequences.sample_weights import by_rejection
from aurora_sgl.sequences.sequence import LoggedProposal, Sequence, readable
from aurora_sgl.sequences.shared_prefixes import own_rows
from aurora_sgl.sequences.splits import (
    conversation_of,
    is_constrained,
    sampling_of,
    sides,
    split_key,
    split_of,
    why_not_judged,
    why_unusable,
)
from aurora_sgl.sequences.trace_reader import TraceFeatures, read_trace
from aurora_sgl.store.queries.requests import RecentRequest

#: Verify steps of a request as they were served, in order (``queries.events.events``).
StepsOf = Callable[[int], list[dict[str, Any]]]

_CACHE_BYTES = 256 * 1024**2


class Loader:
    """Reads sequences from trace files and keeps the last used ones, up to a byte budget.

    ``steps_of`` tells what was served, for proposals and for weights after rejections;
    ``weights`` are those of whole requests, by id.
    """

    def __init__(
        self,
        config: DrafterConfig,
        locate: Locate,
        cache_bytes: int = _CACHE_BYTES,
        *,
        steps_of: StepsOf | None = None,
        weights: Mapping[int, float] | None = None,
        after_rejection_weight: float = 1.0,
    ) -> None:
        self.config, self.locate, self.cache_bytes = config, locate, cache_bytes
        self.steps_of, self.weights = steps_of, weights or {}
        self.after_rejection_weight = after_rejection_weight
        self.train_from: Mapping[int, int] = {}  # by request, see ``shared_prefixes.own_rows``
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

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read already: another process reads for itself."""
        return {**self.__dict__, "cache": OrderedDict(), "held": 0}

    def _read(self, row: RecentRequest, pieces: tuple[Piece, ...]) -> Sequence:
        kind = architectures.named(self.config.architecture)
        features, last = [], []
        own: TraceFeatures | None = None
        for piece in pieces:
            trace = read_trace(self.locate(piece.uri), start=piece.start)
            if trace.end < piece.end:
                raise AuroraError(f"the trace of request {row.request_id} ends too early")
            part = slice(piece.begin - piece.start, piece.end - piece.start)
            features.append(kind.features(trace.aux[part], trace.last[part]))
            last.append(trace.last[part])
            own = trace
        assert own is not None
        steps = self.steps_of(row.request_id) if self.steps_of is not None else []
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
            constrained=is_constrained(row.sampling),
            domain=row.domain,
            conversation=conversation_of(row),
            accept_rule=row.accept_rule,
            sampling=sampling_of(row.sampling),
            proposals=tuple(proposal_of(step) for step in steps if step["depth"]),
            weights=self._weights(row, steps, min(len(own.tokens) - 1, row.end)),
            train_from=self.train_from.get(row.request_id, 0),
        )

    def _weights(
        self, row: RecentRequest, steps: list[dict[str, Any]], rows: int
    ) -> torch.Tensor | None:
        whole = self.weights.get(row.request_id, 1.0)
        if self.after_rejection_weight != 1:
            return whole * by_rejection(steps, rows, row.output_start, self.after_rejection_weight)
        return torch.full((rows,), whole) if whole != 1 else None


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
        return readable(self)

    def length(self, index: int) -> int:
        """Rows of a request that are its own, without reading its file."""
        row = self.items[index][0]
        return row.end - self.loader.train_from.get(row.request_id, 0)


@dataclass
class Dataset:
    """Three disjoint splits, and why requests were left out (reason to count)."""

    train: SequenceSet
    dev: SequenceSet
    gate: SequenceSet
    left_out: Counter[str]
    held_out_left: Counter[str] = field(default_factory=Counter)  # of these the gate's
    counts: Counter[int] = field(default_factory=Counter)  # answer tokens of ``train``


def build(
    rows: Iterable[RecentRequest],
    locate: Locate,
    config: DrafterConfig,
    *,
    dev_share: float,
    gate_share: float,
    donors: Iterable[RecentRequest] = (),
    cache_bytes: int = _CACHE_BYTES,
    steps_of: StepsOf | None = None,
    weights: Mapping[int, float] | None = None,
    after_rejection_weight: float = 1.0,
    most_gate: int | None = None,
    trained: Collection[int] = (),
    unlearnt: Collection[int] = (),
    repeat_prefixes: bool = True,
) -> Dataset:
    """Choose and split requests. Only tokens are read here; features when a request is used.

    ``donors`` are further traces that may fill a cached prefix. Left out are requests with
    penalties or a logit processor (``penalties``, ``processor``), with hardly an answer
    (``short``), whose cached prefix no trace holds (``prefix``), whose file is missing or broken
    (``broken``), and those that nearly repeat a prompt on another side (``duplicate``); from dev
    and gate also those whose accept rule replay does not cover. The gate gets the first
    ``most_gate`` usable ones, as they come; files of later ones are not looked at. ``trained``:
    requests that were learnt from already, so that the gate gets nothing that nearly repeats them;
    ``unlearnt``: such as are the gate's whatever their conversation's side.
    Without ``repeat_prefixes`` rows of a prompt that several requests of ``train`` have are trained
    on in one of them. The other options are :class:`Loader`'s.
    """
    rows = list(rows)
    ids = {row.request_id for row in rows}
    prefixes = Prefixes([*rows, *(d for d in donors if d.request_id not in ids)], locate)
    loader = Loader(
        config,
        locate,
        cache_bytes,
        steps_of=steps_of,
        weights=weights,
        after_rejection_weight=after_rejection_weight,
    )
    data = Dataset(SequenceSet(loader), SequenceSet(loader), SequenceSet(loader), Counter())
    shares = partial(split_of, dev_share=dev_share, gate_share=gate_share)
    choice = _Choice(prefixes, shares, trained, unlearnt)
    held_out = deque(row for row in rows if choice.own_side(row) == "gate")
    for row in rows:
        if choice.own_side(row) != "gate":
            choice.look_at(row)
    side_of = choice.sides(dev_share, gate_share)
    while held_out:
        taken = sum(side == "gate" for side in side_of.values())
        missing = len(held_out) if most_gate is None else most_gate - taken
        if missing <= 0:
            break
        for _ in range(min(missing, len(held_out))):
            choice.look_at(held_out.popleft())
        side_of = choice.sides(dev_share, gate_share)
    data.left_out, data.held_out_left = choice.left_out, choice.held_out_left
    parts = {"train": data.train, "dev": data.dev, "gate": data.gate}
    for row, pieces in choice.usable:
        side = side_of[row.request_id]
        if side in parts:
            parts[side].items.append((row, pieces))
        else:
            choice.leave_out(side, row)
        if side == "train":
            data.counts.update(choice.tokens[row.request_id][row.output_start :].tolist())
    if not repeat_prefixes:
        loader.train_from = own_rows(
            {
                row.request_id: (choice.tokens[row.request_id][: row.end + 1], row.output_start)
                for row, _ in data.train.items
            }
        )
    return data


class _Choice:
    """Requests that were looked at: those that can be used, and why the others can't."""

    def __init__(
        self,
        prefixes: Prefixes,
        split: Callable[[str], str],
        trained: Collection[int],
        unlearnt: Collection[int],
    ) -> None:
        self.prefixes, self.split = prefixes, split
        self.trained, self.unlearnt = trained, unlearnt
        self.usable: list[tuple[RecentRequest, tuple[Piece, ...]]] = []
        self.tokens: dict[int, NDArray[np.int32]] = {}
        self.left_out: Counter[str] = Counter()
        self.held_out_left: Counter[str] = Counter()

    def own_side(self, row: RecentRequest) -> str:
        return "gate" if row.request_id in self.unlearnt else self.split(split_key(row))

    def look_at(self, row: RecentRequest) -> None:
        reason, pieces = self._check(row)
        if pieces is None:
            self.leave_out(reason, row)
            return
        self.usable.append((row, pieces))
        self.tokens[row.request_id] = self.prefixes.tokens_of(row).to(torch.int32).numpy()

    def leave_out(self, reason: str, row: RecentRequest) -> None:
        self.left_out[reason] += 1
        if self.own_side(row) == "gate":
            self.held_out_left[reason] += 1

    def sides(self, dev_share: float, gate_share: float) -> dict[int, str]:
        """See :func:`~aurora_sgl.sequences.splits.sides`."""
        shared = {}
        if dev_share or gate_share:
            ids = ((row.request_id, row.output_start) for row, _ in self.usable)
            shared = near_duplicates({one: self.tokens[one][:start] for one, start in ids})
        rows = (row for row, _ in self.usable)
        return sides(
            rows, shared, dev_share=dev_share, gate_share=gate_share,
            trained=self.trained, unlearnt=self.unlearnt,
        )  # fmt: skip

    def _check(self, row: RecentRequest) -> tuple[str, tuple[Piece, ...] | None]:
        judged = self.own_side(row) != "train"
        if reason := why_not_judged(row) if judged else why_unusable(row):
            return reason, None
        try:
            self.prefixes.tokens_of(row)
            return "prefix", self.prefixes.pieces(row)
        except AuroraError:
            return "broken", None


def proposal_of(step: Mapping[str, Any]) -> LoggedProposal:
    """What a server drafted in one verify step, from a row of ``queries.events.events``."""
    return LoggedProposal(
        root=step["position"] - 1,
        tokens=step["draft_tokens"],
        parents=step["draft_parents"],
        accepted=step["accepted"],
        version_id=step["drafter_version_id"],
    )


def _size(sequence: Sequence) -> int:
    tensors = (sequence.tokens, sequence.features, sequence.last)
    return sum(t.numel() * t.element_size() for t in tensors)
