"""Where tokens and texts of purged requests still lie: every file, and every column of every table.

Tokens are looked for in each way in which anything here writes them: as JSON, as msgpack, as bytes
of int32 and int64, also inside of what is packed (base64 in JSON lines, compressed NumPy files).
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Engine, inspect, text

from aurora_sgl import store

_BASE64 = re.compile(rb"[A-Za-z0-9+/]{40,}={0,2}")


def needles(tokens: list[int], texts: Iterable[str]) -> dict[str, bytes]:
    """What to look for, by a name for the message of a test that fails."""
    count = len(tokens)
    return {
        "json": json.dumps(tokens)[1:-1].encode(),
        "dense json": ",".join(map(str, tokens)).encode(),
        "int32": struct.pack(f"<{count}i", *tokens),
        "int64": struct.pack(f"<{count}q", *tokens),
        "msgpack": b"".join(map(msgspec.msgpack.encode, tokens)),
        "hexadecimal": struct.pack(f"<{count}i", *tokens).hex().encode(),
        **{one: one.encode() for one in texts},
    }


def in_bytes(data: bytes, wanted: dict[str, bytes]) -> Iterator[str]:
    pieces = [data]
    for match in _BASE64.findall(data):
        pieces.append(base64.b64decode(match.rstrip(b"=")[: len(match) // 4 * 4] + b"=="))
    yield from (name for name, one in wanted.items() if any(one in piece for piece in pieces))


def in_files(folder: Path, wanted: dict[str, bytes]) -> set[str]:
    """Paths, each with what lies there."""
    places = set()
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        for data in _contents(path):
            label = str(path.relative_to(folder))
            places |= {f"{label}: {name}" for name in in_bytes(data, wanted)}
    return places


def _contents(path: Path) -> Iterator[bytes]:
    yield path.read_bytes()
    if zipfile.is_zipfile(path):  # npz, and PyTorch's files
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def in_tables(engine: Engine, wanted: dict[str, bytes]) -> set[str]:
    """Tables and columns, each with what stands there."""
    places = set()
    with store.reading(engine) as connection:
        names = inspect(connection).get_table_names()
        for table in names:
            for row in connection.execute(text(f'SELECT * FROM "{table}"')).mappings():
                for column, value in row.items():
                    places |= {
                        f"{table}.{column}: {name}" for name in in_bytes(_plain(value), wanted)
                    }
    return places


def _plain(value: Any) -> bytes:
    if isinstance(value, bytes | memoryview):
        return bytes(value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False).encode()
    return str(value).encode("utf-8", "replace")
