"""The one hot insert: rows of ``acceptance_event``, below SQLAlchemy's type conversion.

A row costs a few microseconds here; SQLAlchemy's own processing of twenty columns a row would
cost more than the database does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from aurora_sgl.clock import from_us
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.packing import pack_ints
from aurora_sgl.wire import VerifyStep

COLUMNS = (
    "request_id", "step", "at", "drafter_version_id", "swap_age", "mixed", "position", "depth",
    "topk", "nodes", "accept_rule", "batch_size", "proposed", "accepted", "kept",
    "first_rejected_at", "draft_tokens", "draft_parents", "accepted_nodes", "target_tokens",
)  # fmt: skip


def insert_events(connection: Connection, steps: Sequence[VerifyStep], boot_version: int) -> None:
    """Insert steps whose keys are known not to be there."""
    if not steps:
        return
    if is_sqlite(connection):
        names, marks = ", ".join(COLUMNS), ", ".join("?" * len(COLUMNS))
        connection.exec_driver_sql(
            f"INSERT INTO acceptance_event ({names}) VALUES ({marks})",
            list(_rows(steps, boot_version, as_text=True)),
        )
        return
    driver: Any = connection.connection.driver_connection  # psycopg.Connection
    copy = f"COPY acceptance_event ({', '.join(COLUMNS)}) FROM STDIN (FORMAT BINARY)"
    with driver.cursor() as cursor, cursor.copy(copy) as stream:
        stream.set_types(
            ["int8", "int4", "timestamptz", "int8", "int4", "bool", *["int4"] * 4, "text",
             *["int4"] * 5, *["bytea"] * 4]
        )  # fmt: skip
        for row in _rows(steps, boot_version, as_text=False):
            stream.write_row(row)


def _rows(
    steps: Sequence[VerifyStep], boot_version: int, *, as_text: bool
) -> Iterator[tuple[Any, ...]]:
    for s in steps:
        at: datetime | str = from_us(s.at_us)
        if as_text and isinstance(at, datetime):
            at = at.strftime("%Y-%m-%d %H:%M:%S.%f")  # as UtcDateTime writes it
        yield (
            s.request_id, s.step, at, s.version_id or boot_version, s.swap_age, s.mixed,
            s.position, s.depth, s.topk, s.nodes, s.accept_rule, s.batch_size, s.proposed,
            s.accepted, s.kept, s.first_rejected_at, pack_ints(s.draft_tokens),
            pack_ints(s.draft_parents), pack_ints(s.accepted_nodes), pack_ints(s.target_tokens),
        )  # fmt: skip
