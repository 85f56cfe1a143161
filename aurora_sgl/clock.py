"""The one place for time. Everything stored is UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def utc_now() -> datetime:
    return datetime.now(UTC)


def from_us(microseconds: int) -> datetime:
    """An aware UTC time from microseconds since the epoch."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def to_us(moment: datetime) -> int:
    """Microseconds since the epoch of an aware time, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)
