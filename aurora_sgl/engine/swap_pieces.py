"""What a weight loader would copy, in pieces that are small beside a step, and the way they take.

SGLang's loaders know where a tensor of a file, or this rank's shard of it, belongs in a parameter.
:func:`copies_of` lets one run on a tensor without contents and notes the copies that it would make;
they are made later, some each step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PIECE = 256 << 10  # bytes: about 0.05 ms
_SLOTS = 16  # of a piece each, that may be on their way to or from a GPU

aten: Any = torch.ops.aten


class NotInPieces(Exception):
    """A loader does more than to copy parts of the tensor."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor here, and the same part of a tensor of the file."""

    here: torch.Tensor  # a view of a shadow or of a parameter
    stride: tuple[int, ...]  # in the file, in elements
    offset: int  # in the file, in bytes from its start
    dtype: torch.dtype  # in the file

    @property
    def span(self) -> int:
        """Bytes of the file that it stretches over."""
        steps = zip(self.here.shape, self.stride, strict=True)
        return (sum((n - 1) * step for n, step in steps) + 1) * self.dtype.itemsize

    @property
    def plain(self) -> bool:
        """Whether it is the same bytes, side by side, here and in the file."""
        return (
            self.here.dtype == self.dtype
            and self.here.is_contiguous()
            and self.here.stride() == self.stride
        )

    def of(self, value: torch.Tensor) -> Part:
        """The same part of another tensor that is laid out like the one it is a view of."""
        here = self.here
        begin = value.storage_offset() + here.storage_offset()  # shadows begin at 0
        view = torch.as_strided(value, here.size(), here.stride(), begin)
        return Part(view, self.stride, self.offset, self.dtype)

    @property
    def _pitch(self) -> int:
        """Bytes from one row to the next in the file."""
        return self.stride[0] * self.dtype.itemsize

    def check(self) -> None:
        """Raises :class:`NotInPieces` for what :meth:`pieces` can't do."""
        if self.here.numel() == 0 or self.span <= PIECE:
            return
        if list(self.stride) != sorted(self.stride, reverse=True):
            raise NotInPieces("its rows are interleaved")
        if not 0 < self._pitch <= PIECE:
            raise NotInPieces(f"a row has {self._pitch} bytes")

    def pieces(self) -> Iterator[Part]:
        """By rows, the last ones first, each at most :data:`PIECE` bytes of the file."""
        if self.here.numel() == 0:
            return
        if self.span <= PIECE:
            yield self
            return
        rows = PIECE // self._pitch
        for first in reversed(range(0, self.here.shape[0], rows)):
            offset = self.offset + first * self._pitch
            yield Part(self.here[first : first + rows], self.stride, offset, self.dtype)


class _Notes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes copies out of one tensor instead of making them; all else is done."""

    def __init__(self, source: torch.Tensor, offset: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storage = source.untyped_storage().data_ptr()
        self._offset = offset
        self.parts: list[Part] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would import its compiler at the first use, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is aten.copy_.default and self._is_ours(args[1]):
            into, part = args[0], args[1]
            if self._is_ours(into):
                raise NotInPieces("it is copied into itself")
            part = part.expand_as(into)
            offset = self._offset + part.storage_offset() * part.dtype.itemsize
            self.parts.append(Part(into, part.stride(), offset, part.dtype))
            return into
        result = func(*args, **(kwargs or {}))
        if any(map(self._is_ours, tree_leaves((args, kwargs)))):
            results = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
            if not all(map(self._is_ours, results)):
                raise NotInPieces(f"it is changed by {func}")
        return result

    def _is_ours(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == self._storage
        )


def copies_of(
    load: Callable[[torch.Tensor], object],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    offset: int,  # of the tensor in the file, in bytes
) -> list[Part]:
    """The copies that ``load`` makes of a tensor. Raises what it raises, and NotInPieces."""
    source = torch.empty(shape, dtype=dtype)  # never written or read: no memory is touched
    with _Notes(source, offset) as notes:
        load(source)
    parts: list[Part] = notes.parts
    for part in parts:
        part.check()
    return parts


@dataclass(slots=True)
class Slot:
    """A buffer between the file and a tensor that can't be read into directly."""

    buffer: torch.Tensor  # [PIECE] uint8 on the CPU, pinned for a GPU
    event: torch.cuda.Event | None = None  # reached when the GPU is done with it
    kept: bool = False  # until its contents have been used

    def view(self, part: Part) -> torch.Tensor:
        """The part as it lies in the file, whose bytes the buffer holds."""
        typed = self.buffer[: part.span].view(part.dtype)
        return torch.as_strided(typed, part.here.size(), part.stride)

    @property
    def done(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]


class Carrier:
    """Between the file and the tensors of one device: directly on a CPU, else by pinned slots."""

    def __init__(self, device: torch.device) -> None:
        self.direct = device.type != "cuda"
        count = 1 if self.direct else _SLOTS
        self._slots = [
            Slot(torch.zeros(PIECE, dtype=torch.uint8, pin_memory=not self.direct))
            for _ in range(count)
        ]
        self.stream: torch.cuda.Stream | None = None
        if not self.direct:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def beside(self) -> AbstractContextManager[Any]:
        """Work of the GPU in here runs beside that of the steps."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def take(self) -> Slot | None:
        """A slot that nobody uses; None: ask at the next step."""
        return next((slot for slot in self._slots if not slot.kept and slot.done), None)

    def sent(self, slot: Slot) -> None:
        """The GPU has been told to read or to fill it."""
        if self.stream is not None:
            slot.event = self.stream.record_event(slot.event)

    def forget(self) -> None:
        """Whoever kept slots is gone."""
        for slot in self._slots:
            slot.kept = False

    def to_host(self, parts: Iterator[Part]) -> Iterator[tuple[torch.Tensor | None, Part | None]]:
        """Each part's values on the CPU in the file's dtype; (None, None): they are on their way,
        ask in a later step.

        The values of a GPU are in a slot, until the next ones are asked for.
        """
        if self.direct:
            for part in parts:
                yield part.here.to(part.dtype), part
            return
        flying: deque[tuple[Slot, Part]] = deque()
        for part in parts:
            while (slot := self.take()) is None:
                yield from self._landed(flying)
            slot.kept = True
            with self.beside():
                slot.view(part).copy_(part.here, non_blocking=True)
            self.sent(slot)
            flying.append((slot, part))
        while flying:
            yield from self._landed(flying)

    @staticmethod
    def _landed(
        flying: deque[tuple[Slot, Part]],
    ) -> Iterator[tuple[torch.Tensor | None, Part | None]]:
        slot, part = flying[0]
        if not slot.done:
            yield None, None
            return
        yield slot.view(part), part
        slot.kept = False
        flying.popleft()
