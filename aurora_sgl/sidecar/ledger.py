"""What is missing of a boot, in records, by the numbers of its envelopes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from aurora_sgl import wire
from aurora_sgl.sidecar.frames import LossFrame
from aurora_sgl.sidecar.spool.cursor import Boot


class SentEnvelope(NamedTuple):
    """An envelope as it came."""

    seq: int
    records: list[wire.Record]  # those that this release can read
    before: int  # records in all envelopes before it; 0: an engine that does not say so
    size: int  # its records, read or not


def is_stored(boot: Boot, seq: int) -> bool:
    """Whether the store has an envelope that is read again."""
    return seq <= min(boot.last_seq, boot.stored)


def count_losses(boot: Boot, batch: Iterable[SentEnvelope], notes: Iterable[LossFrame]) -> None:
    """Count what the numbers of envelopes that come for the first time say is missing."""
    for loss in notes:
        boot.spool_full += loss.records
        boot.explained += loss.envelopes
        boot.explained_records += loss.records
    for one in batch:
        if one.seq <= boot.last_seq:
            continue
        stored = max(boot.last_seq, boot.ahead)
        if one.seq > stored + 1:
            _count_gap(boot, one.seq - stored - 1, one)
        boot.last_seq = one.seq
        boot.total = one.before + one.size if one.before or one.seq == 1 else 0
        for record in one.records:
            if isinstance(record, wire.Hello):
                boot.hello = record
                boot.dropped = max(boot.dropped, record.dropped)


def _count_gap(boot: Boot, gap: int, after: SentEnvelope) -> None:
    """``gap``: envelopes that did not come before this one. Those that the full spool refused were
    counted already."""
    if not after.before:
        missing, explained = gap, min(gap, boot.explained)
    else:
        exact = boot.last_seq >= boot.ahead and (boot.total or not boot.last_seq)
        missing = max(0, after.before - boot.total) if exact else _records_in(gap, after)
        explained = min(missing, boot.explained_records)
    boot.explained = max(0, boot.explained - gap)
    boot.explained_records = max(0, boot.explained_records - missing)
    boot.transport += missing - explained


def count_forgotten(boot: Boot, batch: Iterable[SentEnvelope]) -> None:
    """Count what the store had, forgot, and what no longer lies before these envelopes."""
    for one in batch:
        if boot.behind and one.seq <= boot.last_seq:
            gap = one.seq - boot.stored - 1
            boot.forgotten += _records_in(gap, one) if gap > 0 else 0
            boot.behind = False


def give_up_forgotten(boot: Boot) -> None:
    """All was read again and nothing of this boot was there."""
    if boot.behind:
        gap = boot.last_seq - boot.stored
        boot.forgotten += round(boot.total * gap / boot.last_seq) if boot.total else gap
        boot.behind = False


def losses(boot: Boot) -> dict[str, int]:
    """Records of a boot that will never be in the store, by the place where they were lost."""
    return {
        "engine": boot.dropped,
        "transport": boot.transport,
        "spool": boot.spool_full,
        "rejected": boot.rejected,
        "store": boot.forgotten,
    }


def _records_in(gap: int, after: SentEnvelope) -> int:
    """About as many records as in so many envelopes before this one, at least one each."""
    if not after.before or after.seq < 2:
        return gap
    return max(gap, round(after.before * gap / (after.seq - 1)))
