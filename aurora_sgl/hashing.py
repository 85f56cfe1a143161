"""The one place for hashes: SHA-256, hexadecimal, everywhere."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from pathlib import Path


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def keyed_sha256(key: bytes, data: bytes) -> str:
    """A hash that only who has the key can make."""
    return hmac.new(key, data, hashlib.sha256).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, read in pieces. Raises ``OSError`` when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_ints(values: Sequence[int]) -> str:
    """Hash of token ids, as little-endian int32."""
    return sha256_bytes(struct.pack(f"<{len(values)}i", *values))
