"""Where a conversation lies between the sides that it may be on: known from its key alone, so that
whoever trains, judges or makes room says the same."""

from __future__ import annotations

from aurora_sgl.hashing import sha256_bytes

#: Share of conversations that no run trains on, unless a recipe says otherwise: places below it.
GATE_SHARE = 0.15


def place(key: str) -> float:
    """In [0, 1), the same for a key for ever."""
    return int(sha256_bytes(f"split:{key}".encode())[:8], 16) / 0x1_0000_0000
