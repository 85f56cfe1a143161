"""What was purged does not come back: rules and numbers that ingest and the traces' intake heed.

A purge leaves the numbers of the requests that it removed, and a rule for those that the store
has not got yet (they lie in a spool, perhaps on another machine). A rule names a rid, a
conversation or a domain by a keyed hash only, and holds for what was admitted up to the purge:
what is served afterwards under the same name is new. The engine sends a conversation's plain hash
and the store has it salted, so a rule holds what was named and its salted form, and either form of
a record's is looked for.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, func, select, text

from aurora_sgl import wire
from aurora_sgl.clock import to_us
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.models import ErasedRequest, Erasure, Request
from aurora_sgl.store.salt import forms, known_key
from aurora_sgl.store.upsert import insert_missing, storable

#: Values of one IN list.
CHUNK = 400
#: Key of the PostgreSQL advisory lock that ingest shares and a purge takes once, alone.
_LOCK = 0x4175726F7265
#: Which text of a request a rule of each kind looks at.
TEXTS = {"rid": "rid", "conversation": "conversation_hash", "domain": "domain"}

Numbered = tuple[int, Sequence[wire.Record]]  # an envelope's number and its records


def key_hash(salt: str, kind: str, value: str) -> str:
    """HMAC-SHA-256 of a rid, a conversation's hash or a domain, hexadecimal."""
    message = f"{kind}:{value}".encode("utf-8", "surrogatepass")
    return hmac.new(bytes.fromhex(salt), message, hashlib.sha256).hexdigest()


@dataclass
class ErasureRules:
    """The rules of all purges of a store. They share one salt, unless one store's rows were
    restored into another one."""

    salts: set[str] = field(default_factory=set)
    before_us: int | None = None  # everything that was admitted up to then, since the epoch
    before_id: int = 0
    named: dict[tuple[str, str], list[tuple[int, int]]] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    hashes_key: bytes = b""  # see ``store.salt``

    def __bool__(self) -> bool:
        return bool(self.salts)

    def add(self, rule: Any) -> None:
        """``rule``: a row of ``erasure``."""
        self.salts.add(rule.salt)
        until_us = to_us(rule.until)
        if rule.kind == "before":
            if self.before_us is None or until_us > self.before_us:
                self.before_us, self.before_id = until_us, rule.id
        elif rule.kind in TEXTS:
            self.kinds.add(rule.kind)
            for hashed in rule.key_hash.split():
                self.named.setdefault((rule.kind, hashed), []).append((until_us, rule.id))

    def erasure_of(self, texts: Mapping[str, str], admitted_us: int) -> int:
        """The purge that covers a request with these texts (by column); 0: none."""
        if self.before_us is not None and admitted_us <= self.before_us:
            return self.before_id
        for kind in self.kinds:
            for until_us, erasure_id in self.of_text(kind, texts[TEXTS[kind]]):
                if admitted_us <= until_us:
                    return erasure_id
        return 0

    def of_text(self, kind: str, value: str) -> list[tuple[int, int]]:
        """The purges of a rid, a conversation or a domain: until when (microseconds), and their
        numbers."""
        values = forms(self.hashes_key, value) if kind == "conversation" else [value]
        hashes = (key_hash(salt, kind, one) for salt in self.salts for one in values)
        return [one for hashed in hashes for one in self.named.get((kind, hashed), ())]


def rules_of(connection: Connection) -> ErasureRules:
    rules = ErasureRules()
    e = Erasure
    for row in connection.execute(select(e.id, e.kind, e.salt, e.key_hash, e.until)):
        rules.add(row)
    if "conversation" in rules.kinds:
        rules.hashes_key = known_key(connection)
    return rules


def erased_ids(connection: Connection, request_ids: Iterable[int]) -> set[int]:
    """Which of these requests were purged."""
    ids = sorted(set(request_ids))
    column = ErasedRequest.request_id
    return {
        request_id
        for begin in range(0, len(ids), CHUNK)
        for request_id in connection.scalars(
            select(column).where(column.in_(ids[begin : begin + CHUNK]))
        )
    }


def add_erased(connection: Connection, erasure_of: Mapping[int, int]) -> None:
    """Note requests, each with the purge that it fell to."""
    rows = [{"request_id": one, "erasure_id": erasure} for one, erasure in erasure_of.items()]
    insert_missing(connection, ErasedRequest, rows, ["request_id"])


def erased_among(connection: Connection, records: Sequence[wire.Record]) -> set[int]:
    """The requests among records that were purged; those that a rule covers are noted."""
    rules = rules_of(connection)
    if not rules:
        return set()
    starts: dict[int, wire.RequestStarted] = {}
    others: dict[int, int] = {}  # request -> its first moment here, without its start
    for record in records:
        if isinstance(record, wire.RequestStarted):
            starts[record.request_id] = record
        elif isinstance(record, wire.VerifyStep | wire.RequestFinished):
            others.setdefault(record.request_id, record.at_us)
    erased = erased_ids(connection, [*starts, *others])
    fresh: dict[int, int] = {}
    for request_id, start in starts.items():
        if request_id not in erased:
            texts = {name: str(storable(getattr(start, name))) for name in TEXTS.values()}
            fresh[request_id] = rules.erasure_of(texts, start.at_us)
    lost = {one: us for one, us in others.items() if one not in starts and one not in erased}
    fresh |= _without_start(connection, rules, lost)
    fresh = {request_id: erasure for request_id, erasure in fresh.items() if erasure}
    add_erased(connection, fresh)
    return erased | fresh.keys()


def _without_start(
    connection: Connection, rules: ErasureRules, moments: Mapping[int, int]
) -> dict[int, int]:
    """Of requests whose start did not come with these records, those that the store has not got
    either: it would make a row in the domain ``default`` for them."""
    ids = sorted(moments)
    present = {
        one
        for begin in range(0, len(ids), CHUNK)
        for one in connection.scalars(
            select(Request.id).where(Request.id.in_(ids[begin : begin + CHUNK]))
        )
    }
    texts = {"rid": "", "conversation_hash": "", "domain": "default"}
    return {
        one: rules.erasure_of(texts, moment)
        for one, moment in moments.items()
        if one not in present
    }


def without_erased(connection: Connection, batch: Sequence[Numbered]) -> list[Numbered]:
    """A batch without records of purged requests; its envelopes keep their numbers.

    In PostgreSQL the shared lock stays until the transaction ends, so that a purge can wait for
    whoever read the rules before it wrote its own (:func:`wait_for_ingests`).
    """
    if not is_sqlite(connection):
        connection.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": _LOCK})
    erased = erased_among(connection, [one for _, records in batch for one in records])
    if not erased:
        return list(batch)
    return [(seq, kept_records(records, erased)) for seq, records in batch]


def kept_records(records: Sequence[wire.Record], erased: set[int]) -> list[wire.Record]:
    return [one for one in records if getattr(one, "request_id", None) not in erased]


def wait_for_ingests(engine: Engine) -> None:
    """Every ingest that does not know of the rules as they are now has ended when this returns.
    SQLite has one writer at a time, which reads the rules in its own transaction."""
    if not is_sqlite(engine):
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


#: The mark of a store of which nothing was ever purged.
NO_PURGE: tuple[int, datetime | None, datetime | None] = (0, None, None)


def erasure_mark(connection: Connection) -> tuple[int, datetime | None, datetime | None]:
    """Changes with every purge that begins, goes on, or has removed its last row."""
    e = Erasure
    newest = connection.execute(
        select(func.max(e.id), func.max(e.until), func.max(e.rows_at))
    ).one()
    return newest[0] or 0, newest[1], newest[2]
