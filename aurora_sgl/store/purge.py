"""What a purge covers, and its row in ``erasure``: begun, its rows gone, finished.

The rows themselves go in ``store.purge_rows``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, select, true

from aurora_sgl.client_text import as_sent, clean, of_header
from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.store import queries
from aurora_sgl.store.connection import reading, session
from aurora_sgl.store.erased import add_erased, key_hash, rules_of
from aurora_sgl.store.models import DeploymentGroup, DrafterVersion, Erasure, Request
from aurora_sgl.store.salt import forms, known_key, made_key

_HASH = re.compile(r"[0-9a-f]{64}")
_MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class Selector:
    """Which requests a purge covers: those named by one of four things, or all; that were
    admitted up to ``until``."""

    kind: str  # request, rid, conversation, domain, before
    value: str
    until: datetime

    def __post_init__(self) -> None:
        """Raises ``AuroraError`` for what selects nothing or the future."""
        if self.kind != "before" and not any(self._as_recorded):
            raise AuroraError(f"--{self.kind} is empty; nothing was purged")
        is_number = self.value.isdecimal() and 0 < int(self.value) < 1 << 63
        if self.kind == "request" and not is_number:
            raise AuroraError(f"--request {self.value} is no number of a request")
        if self.until > utc_now() + _MINUTE:
            raise AuroraError(f"--before {self.until.isoformat()} lies in the future")

    @property
    def _as_recorded(self) -> set[str]:
        """The value as the engine cleans it. A domain comes in a header, which loses the space
        around it, a rid in a field, which does not, and a conversation in either."""
        if self.kind in ("request", "before"):
            return {self.value}
        field, header = clean(self.value), clean(of_header(as_sent(self.value)))
        ways = {"rid": {field}, "domain": {header}, "conversation": {field, header}}
        return ways[self.kind] - {""}

    @property
    def stored_texts(self) -> list[str]:
        """What stands for it in records: of a conversation hashes."""
        if self.kind != "conversation" or _HASH.fullmatch(self.value):
            return sorted(self._as_recorded)
        return sorted(sha256_ints(list(text.encode())) for text in self._as_recorded)

    def stored_values(self, key: bytes) -> list[str]:
        """As rows and rules have it; ``key``: of salted hashes."""
        key = key if self.kind == "conversation" else b""
        return [form for text in self.stored_texts for form in forms(key, text)]

    def condition(self, connection: Connection) -> ColumnElement[bool]:
        """On rows of requests."""
        if self.kind == "request":
            return Request.id == int(self.value)
        values = self.stored_values(known_key(connection))
        named: dict[str, ColumnElement[bool]] = {
            "rid": Request.rid.in_(values),
            "conversation": Request.conversation_hash.in_(values),
            "domain": Request.domain.in_(values),
            "before": true(),
        }
        return named[self.kind] & (Request.admitted_at <= self.until)


@dataclass
class RowCounts:
    """What a purge took out of tables."""

    requests: int = 0
    events: int = 0
    traces: int = 0

    @classmethod
    def of(cls, details: dict[str, Any]) -> RowCounts:
        return cls(**{one.name: int(details.get(one.name, 0)) for one in fields(cls)})


def numbered(request_ids: Sequence[int]) -> ColumnElement[bool]:
    """The condition that names requests by their numbers."""
    return Request.id.in_(request_ids)


def begin_purge(engine: Engine, selector: Selector, *, actor: str, reason: str) -> int:
    """Write the rule of a purge, which holds from the commit on; the number of the purge. One of
    the same thing that did not finish goes on under its number."""
    e = Erasure
    with session(engine) as s:
        salt = min(rules_of(s.connection()).salts, default="") or secrets.token_hex(16)
        hashed = ""
        if selector.kind != "before":
            values = selector.stored_values(made_key(s.connection()))
            hashed = " ".join(key_hash(salt, selector.kind, value) for value in values)
        row = s.scalars(
            select(e)
            .where(e.kind == selector.kind, e.key_hash == hashed, e.finished_at.is_(None))
            .order_by(e.id.desc())
            .limit(1)
        ).one_or_none()
        if row is None:
            row = Erasure(
                kind=selector.kind,
                salt=salt,
                key_hash=hashed,
                until=selector.until,
                started_at=utc_now(),
                actor=actor,
                reason=reason,
                details={},
            )
            s.add(row)
        row.until = max(row.until, selector.until)
        s.flush()
        if selector.kind == "request":
            add_erased(s.connection(), {int(selector.value): row.id})
        return row.id


def erasure(engine: Engine, erasure_id: int) -> Erasure:
    with session(engine, write=False) as s:
        row = s.get(Erasure, erasure_id)
        assert row is not None
        return row


def rows_are_gone(engine: Engine, erasure_id: int) -> None:
    """Running sidecars look through their spools once more."""
    with session(engine) as s:
        row = s.get(Erasure, erasure_id)
        assert row is not None
        row.rows_at = utc_now()


def finish_purge(
    engine: Engine, erasure_id: int, versions: Sequence[int], *, group: str, actor: str
) -> None:
    """Nothing is left to do: say so in the audit of each group that requests were taken from (of
    the group named, where there were none), with what went and without what it was."""
    with session(engine) as s:
        row = s.get(Erasure, erasure_id)
        assert row is not None
        row.details = {**row.details, "versions": list(versions)}
        row.finished_at = utc_now()
        groups = list(row.details.get("groups", ()))
        if not groups:
            groups = list(
                s.scalars(select(DeploymentGroup.id).where(DeploymentGroup.name == group))
            )
        after = {name: value for name, value in row.details.items() if name != "groups"}
        for group_id in groups:
            queries.audit.add_audit(
                s, group_id, actor=actor, action="purge", subject=f"{row.kind}, purge {row.id}",
                reason=row.reason, after={"until": row.until.isoformat(), **after},
            )  # fmt: skip


def versions_of_runs(engine: Engine, runs: Iterable[int]) -> tuple[list[int], list[int]]:
    """Versions that these runs made, and further versions that were made from those."""
    v, wanted = DrafterVersion, set(runs)
    with reading(engine) as connection:
        rows = connection.execute(select(v.id, v.parent_id, v.training_run_id).order_by(v.id)).all()
    learnt = [row.id for row in rows if row.training_run_id in wanted]
    derived: list[int] = []
    for row in rows:  # a parent is older than what is made from it
        if row.id not in learnt and row.parent_id in {*learnt, *derived}:
            derived.append(row.id)
    return learnt, derived
