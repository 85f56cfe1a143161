"""Token and log-probability columns: little-endian int32 and float16, back to back."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def pack_ints(values: Sequence[int]) -> bytes:
    """Raises ``struct.error`` for a value outside of int32."""
    return struct.pack(f"<{len(values)}i", *values)


def unpack_ints(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 4}i", data))


def pack_floats(values: Sequence[float]) -> bytes:
    """Rounded to float16; raises ``OverflowError`` beyond +-65504."""
    return struct.pack(f"<{len(values)}e", *values)


def unpack_floats(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 2}e", data))
