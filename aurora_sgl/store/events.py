"""The one hot insert: rows of ``acceptance_event``, below SQLAlchemy's type conversion.

A row costs a few microseconds here; SQLAlchemy's own processing of twenty columns a row would
cost more than the database does.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, LargeBinary
from sqlalchemy.dialects import postgresql

from aurora_sgl.clock import from_us
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.models import AcceptanceEvent
from aurora_sgl.store.packing import pack_ints
from aurora_sgl.wire import VerifyStep

#: All columns come from the model. Those that a step has under the same name are taken from there,
#: binary ones packed; what else is inserted has its own value in :func:`_rows`.
_OF_A_STEP = [
    column
    for column in AcceptanceEvent.__table__.columns
    if column.name in VerifyStep.__struct_fields__
]
PLAIN = tuple(c.name for c in _OF_A_STEP if not isinstance(c.type, LargeBinary))
PACKED_INTS = tuple(c.name for c in _OF_A_STEP if isinstance(c.type, LargeBinary))
#: What is inserted, in the order of :func:`_rows`.
COLUMNS = ("at", "drafter_version_id", *PLAIN, *PACKED_INTS)
#: PostgreSQL's names of their types, which a binary COPY has to be told.
_POSTGRES = postgresql.dialect()  # type: ignore[no-untyped-call]
_KINDS = [AcceptanceEvent.__table__.c[name].type.compile(_POSTGRES).lower() for name in COLUMNS]


def insert_events(
    connection: Connection,
    steps: Sequence[VerifyStep],
    boot_version: int,
    bare: Container[int] = (),
) -> None:
    """Insert steps whose keys are known not to be there; ``bare``: the requests of which nothing
    is kept but counts."""
    if not steps:
        return
    if is_sqlite(connection):
        names, marks = ", ".join(COLUMNS), ", ".join("?" * len(COLUMNS))
        connection.exec_driver_sql(
            f"INSERT INTO acceptance_event ({names}) VALUES ({marks})",
            list(_rows(steps, boot_version, bare, as_text=True)),
        )
        return
    driver: Any = connection.connection.driver_connection  # psycopg.Connection
    copy = f"COPY acceptance_event ({', '.join(COLUMNS)}) FROM STDIN (FORMAT BINARY)"
    with driver.cursor() as cursor, cursor.copy(copy) as stream:
        stream.set_types(_KINDS)
        for row in _rows(steps, boot_version, bare, as_text=False):
            stream.write_row(row)


def _rows(
    steps: Sequence[VerifyStep], boot_version: int, bare: Container[int], *, as_text: bool
) -> Iterator[tuple[Any, ...]]:
    plain, packed = attrgetter(*PLAIN), attrgetter(*PACKED_INTS)
    nothing = (b"",) * len(PACKED_INTS)
    for step in steps:
        moment = from_us(step.at_us)
        yield (
            moment.strftime("%Y-%m-%d %H:%M:%S.%f") if as_text else moment,  # as UtcDateTime does
            step.version_id or boot_version,
            *plain(step),
            *(nothing if step.request_id in bare else map(pack_ints, packed(step))),
        )
