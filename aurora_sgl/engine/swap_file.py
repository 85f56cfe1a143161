"""A safetensors file in shared memory, read and written in pieces by the scheduler's thread.

By ``pread`` and ``pwrite``: a mapping would cost page faults in the step, take tens of milliseconds
to unmap, and end the process when somebody cuts the file short.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 16 << 20  # bytes


class SwapRefused(Exception):
    """The weights cannot go live here; the message says why."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class WeightsFile:
    """Raises :class:`SwapRefused` for a file that is not whole, and ``OSError``."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self._descriptor = os.open(path, flags)
        try:
            self.tensors = self._entries(os.fstat(self._descriptor).st_size)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
                RecursionError) as error:  # fmt: skip
            self.close()
            raise SwapRefused(f"the staged weights cannot be read: {error}") from error
        except BaseException:
            self.close()
            raise

    def _entries(self, size: int) -> dict[str, FileTensor]:
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise SwapRefused("the staged weights are cut short")
        header = json.loads(os.pread(self._descriptor, length, 8))
        header.pop("__metadata__", None)
        entries = {name: self._entry(one, 8 + length) for name, one in header.items()}
        if max((entry.end for entry in entries.values()), default=0) > size:
            raise SwapRefused("the staged weights are cut short")
        return entries

    @staticmethod
    def _entry(one: dict[str, Any], start: int) -> FileTensor:
        dtype = _DTYPES.get(one["dtype"])
        if dtype is None:
            raise SwapRefused(f"the staged weights are of the kind {one['dtype']}")
        begin, end = (start + int(offset) for offset in one["data_offsets"])
        shape = tuple(int(size) for size in one["shape"])
        if begin < start or min(shape, default=0) < 0:
            raise SwapRefused("the staged weights' places are none")
        if end - begin != torch.Size(shape).numel() * dtype.itemsize:
            raise SwapRefused("the staged weights' sizes and shapes differ")
        return FileTensor(dtype, shape, begin, end)

    def read(self, into: torch.Tensor, offset: int) -> None:
        """Fill a tensor on the CPU, whose elements lie side by side."""
        buffer = as_bytes(into)
        count = os.preadv(self._descriptor, [buffer], offset) if len(buffer) else 0
        if count != len(buffer):
            raise SwapRefused("the staged weights were cut short while they were read")

    def write(self, tensor: torch.Tensor, offset: int) -> None:
        """Write a tensor on the CPU, whose elements lie side by side."""
        buffer = as_bytes(tensor)
        while len(buffer):
            count = os.pwrite(self._descriptor, buffer, offset)
            buffer, offset = buffer[count:], offset + count

    def cut(self, size: int) -> None:
        """Leave the first ``size`` bytes; the memory of the others is free again."""
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return view
