"""The one place for time. Everything stored is UTC."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> datetime:
    return datetime.now(UTC)


def from_us(microseconds: int) -> datetime:
    """An aware UTC time from microseconds since the epoch."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC)
