"""Hashes of prompts and conversations, salted: who reads one can't try what it was made of.

A hash of few tokens, or of a user's name, is found by hashing guesses. So the store keeps what such
a hash becomes under a secret key of its own, the same for all servers and restarts. Equal ones stay
equal, which is all that they are for. Rows from before schema 0010 keep the plain hash, by which a
held-out request is held out for good.
"""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, select

from aurora_sgl.hashing import keyed_sha256
from aurora_sgl.store.models import StoreKey
from aurora_sgl.store.upsert import insert_missing

HASHES = "hashes"  # name of the key


class Salt:
    """What turns a hash into the one that the store keeps; an empty one stays empty."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._key = b""

    def __call__(self, plain: str) -> str:
        if not plain:
            return ""
        self._key = self._key or made_key(self._connection)
        return keyed_sha256(self._key, plain.encode())


def forms(key: bytes, value: str) -> list[str]:
    """A hash as it is, and as salting it gives: whoever names one may have read it here or have
    made it, and old rows have plain ones."""
    return [value, keyed_sha256(key, value.encode())] if key and value else [value]


def known_key(connection: Connection) -> bytes:
    """Empty before anything was salted. Writes nothing."""
    stored = connection.scalar(select(StoreKey.value).where(StoreKey.name == HASHES))
    return bytes.fromhex(stored or "")


def made_key(connection: Connection) -> bytes:
    """The first one who needs it makes it; the key of the row decides who was first."""
    key = known_key(connection)
    if not key:
        row = {"name": HASHES, "value": secrets.token_hex(32)}
        insert_missing(connection, StoreKey, [row], ["name"])
        key = known_key(connection)
    assert key
    return key
