"""Rows of numbers in a few bits each: integers in blocks that share a scale.

A block of ``BLOCK`` numbers of a row is a whole multiple, from -(2^(bits-1) - 1) to as much, of its
step; a step is at most a half too far away, so that an error is at most half a step. Blocks and not
rows share one, since some tokens (the first of a text above all) have a few numbers hundreds of
times larger than the others (Sun et al. 2024, "Massive Activations in Large Language Models").

A step has 8 bits: it is the row's largest number, times 2^(-code / 16), by the largest multiple,
rounded up, so that nothing is clipped. Code 255 is a block that is nothing beside its row.

Before that each channel (column) is divided by the square root of its usual size, since channels
differ as much as tokens do: whole sizes would give all channels the same relative error, none the
same absolute one, and the geometric middle of both has the least squared error at a given number of
bits. Measured on SmolLM2-135M's states that is worth more than a bit: 4 bits 7.2% where they had
16.6%. A channel's factor is 2^(-code / 8).

Of each number's bits four are in ``nibbles``, two numbers a byte, the lower half of the bytes the
first ones of a block pair; each further bit is a plane of its own, eight numbers a byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
FEWEST_BITS, MOST_BITS = 4, 8
_STEPS_AN_OCTAVE = 16.0
_NOTHING = 255  # code of a block of zeros
_CHANNEL_STEPS_AN_OCTAVE = 8.0
_SAMPLE = 48  # rows that tell a channel's usual size
_LEAST_SHARE = 1e-3  # of the largest channel, that a channel counts as
_CHUNK = 1 << 17  # numbers worked on at once: what the processor's cache holds

_NOT_FINITE = "a row has a number that is not finite"

Numbers = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class CompactRows:
    """``n`` rows of ``width`` numbers."""

    packed: Bytes  # shape: [n, packed_bytes(width, bits)]
    codes: Bytes  # shape: [n, blocks(width)], of the steps
    largest: Numbers  # shape: [n]
    channels: Bytes  # shape: [width], of the channels' factors
    bits: int
    width: int

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for parts that don't belong together."""
        rows = len(self.largest)
        if self.largest.dtype != np.float32 or not np.isfinite(self.largest).all():
            raise ValueError("numbers that are the largest of their rows")
        if self.channels.shape != (self.width,) or self.channels.dtype != np.uint8:
            raise ValueError(f"{self.channels.shape} channels for rows of {self.width}")
        if not FEWEST_BITS <= self.bits <= MOST_BITS:
            raise ValueError(f"{self.bits} bits a number")
        for part, width in (
            (self.packed, packed_bytes(self.width, self.bits)),
            (self.codes, blocks(self.width)),
        ):
            if part.shape != (rows, width) or part.dtype != np.uint8:
                raise ValueError(f"parts of shape {part.shape} for {rows} rows of {self.width}")


def blocks(width: int) -> int:
    """Blocks of a row; the last one may be filled up with zeros."""
    return -(-width // BLOCK)


def packed_bytes(width: int, bits: int) -> int:
    return blocks(width) * BLOCK * bits // 8


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one row in all its parts."""
    return packed_bytes(width, bits) + blocks(width) + 4


def compact(rows: NDArray[np.uint8], dtype: str, bits: int) -> CompactRows:
    """Rows as raw bytes, shape [n, width * item bytes], of ``bfloat16``, ``float16`` or
    ``float32``. Raises ``ValueError`` for a row with a number that is not finite."""
    width = numbers_of(rows[:1], dtype).shape[1]
    count, inner = len(rows), blocks(width) * BLOCK
    channels = _channels(numbers_of(rows[:: max(1, -(-count // _SAMPLE))], dtype))
    inverse = (1 / _factors(channels)).astype(np.float32)
    packed = np.empty((count, packed_bytes(width, bits)), np.uint8)
    codes = np.empty((count, blocks(width)), np.uint8)
    largest = np.empty(count, np.float32)
    together = max(1, _CHUNK // max(1, inner))
    for begin in range(0, count, together):
        part = slice(begin, min(begin + together, count))
        with np.errstate(over="ignore", invalid="ignore"):
            numbers: Numbers = numbers_of(rows[part], dtype) * inverse
        if inner != width:
            numbers = np.pad(numbers, ((0, 0), (0, inner - width)))
        _compact_part(numbers, bits, packed[part], codes[part], largest[part])
    return CompactRows(packed, codes, largest, channels, bits, width)


def _channels(sample: Numbers) -> Bytes:
    """Codes of the channels' factors, from a few rows."""
    if not len(sample):
        return np.zeros(sample.shape[1], np.uint8)
    size = np.median(np.abs(sample), axis=0)
    if not np.isfinite(size).all():
        raise ValueError(_NOT_FINITE)
    top = size.max(initial=0.0) or 1.0
    octaves = np.log2(top / np.maximum(size, _LEAST_SHARE * top)) / 2
    codes: Bytes = np.round(octaves * _CHANNEL_STEPS_AN_OCTAVE).astype(np.uint8)
    return codes


def _factors(channels: Bytes) -> Numbers:
    return np.exp2(channels / np.float32(-_CHANNEL_STEPS_AN_OCTAVE)).astype(np.float32)


def numbers_of(rows: NDArray[np.uint8], dtype: str) -> Numbers:
    """Raw bytes as numbers, shape [n, width]."""
    rows = np.ascontiguousarray(rows)
    if dtype == "bfloat16":
        wide = rows.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype not in ("float16", "float32"):
        raise ValueError(f"numbers of dtype {dtype}")
    return rows.view(np.dtype(dtype)).astype(np.float32)


def _compact_part(
    numbers: Numbers, bits: int, packed: Bytes, codes: Bytes, largest: Numbers
) -> None:
    most = (1 << (bits - 1)) - 1
    count = len(numbers)
    parts = numbers.reshape(count, -1, BLOCK)
    size = np.maximum(parts.max(-1), -parts.min(-1))
    np.max(size, axis=1, out=largest)  # NaN where the row has one
    if not np.isfinite(largest).all():
        raise ValueError(_NOT_FINITE)
    codes[:] = _codes(size, largest)
    steps = _steps(codes, largest, most)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(steps > 0, 1 / steps, 0).astype(np.float32)
    inverse[~np.isfinite(inverse)] = 0
    scaled = parts * inverse[..., None]
    scaled += most + 1.5  # positive, so that cutting off is rounding
    _pack(scaled.astype(np.uint8).reshape(count, -1), bits, packed)


def _codes(size: Numbers, largest: Numbers) -> Bytes:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        octaves = np.log2(largest[:, None] / size)
    # An eighth of a code less than the logarithm says: rounding never makes a step too small.
    codes = np.floor(octaves * _STEPS_AN_OCTAVE - 1e-3)
    return np.where(codes < _NOTHING, np.maximum(codes, 0), _NOTHING).astype(np.uint8)


_SHARES = np.exp2(-np.arange(256) / _STEPS_AN_OCTAVE).astype(np.float32)
_SHARES[_NOTHING] = 0


def _steps(codes: Bytes, largest: Numbers, most: int) -> Numbers:
    return _SHARES[codes] * (largest / np.float32(most))[:, None]


def _pack(values: Bytes, bits: int, packed: Bytes) -> None:
    """``values``: shape [n, width], below 2^bits."""
    half = values.shape[1] // 2
    high = values >> (bits - 4)
    packed[:, :half] = high[:, :half] | (high[:, half:] << 4)
    begin = half
    for plane in range(bits - 4):
        part = np.packbits(values >> plane & 1, axis=1)
        packed[:, begin : begin + part.shape[1]] = part
        begin += part.shape[1]


def numbers(rows: CompactRows) -> Numbers:
    """The numbers again, shape [n, width]."""
    decoded = np.empty((len(rows.largest), rows.width), np.float32)
    factors = _factors(rows.channels)
    together = max(1, _CHUNK // max(1, rows.width))
    for begin in range(0, len(decoded), together):
        part = slice(begin, begin + together)
        np.multiply(_numbers_part(rows, part), factors, out=decoded[part])
    return decoded


def _numbers_part(rows: CompactRows, part: slice) -> Numbers:
    most = (1 << (rows.bits - 1)) - 1
    packed, codes = rows.packed[part], rows.codes[part]
    inner = codes.shape[1] * BLOCK
    half = inner // 2
    nibbles = packed[:, :half]
    values = np.concatenate((nibbles & 15, nibbles >> 4), axis=1)
    values <<= rows.bits - 4
    for plane in range(rows.bits - 4):
        begin = half + plane * (inner // 8)
        values |= np.unpackbits(packed[:, begin : begin + inner // 8], axis=1) << plane
    decoded = values.astype(np.float32).reshape(len(values), -1, BLOCK)
    decoded -= most + 1
    decoded *= _steps(codes, rows.largest[part], most)[..., None]
    return decoded.reshape(len(values), -1)[:, : rows.width]
