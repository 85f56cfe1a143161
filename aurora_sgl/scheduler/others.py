"""A training run that is not ours: of a person, or of a scheduler that is gone."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import datetime

import psutil
from sqlalchemy.orm import Session

from aurora_sgl.store import queries
from aurora_sgl.store.liveness import TRAINING_LEASE_SECONDS, training_lease_name


class OtherRuns:
    """Whether somebody else trains, by the lease of training. One that can't be renewed any more
    is given back: its process is not there, or it did not change for its whole length on our
    steady clock (its expiry may lie far ahead, where a clock was set back)."""

    def __init__(self, group_id: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._group_id = group_id
        self._monotonic = monotonic
        self._stamp: tuple[int, datetime] | None = None  # its token and expires_at, as last read
        self._stamp_at = 0.0  # monotonic, when it was first read

    def going_on(self, s: Session, now: datetime) -> str:
        """Which process trains, as host:pid; empty: none."""
        row = queries.leases.lease(s, training_lease_name(self._group_id))
        if row is None or row.expires_at <= now:
            self._stamp = None
            return ""
        stamp = (row.token, row.expires_at)
        if stamp != self._stamp:
            self._stamp, self._stamp_at = stamp, self._monotonic()
        host, _, rest = row.holder.partition(":")
        pid = rest.partition(":")[0]
        gone = host == socket.gethostname() and pid.isdecimal() and not psutil.pid_exists(int(pid))
        if gone or self._monotonic() - self._stamp_at > TRAINING_LEASE_SECONDS:
            queries.leases.release_lease(s, row.name, row.holder, row.token)
            return ""
        return f"{host}:{pid}"

    def hold_for(self, s: Session, pid: int) -> None:
        """Renew the lease of our own run, which can't while it is paused."""
        row = queries.leases.lease(s, training_lease_name(self._group_id))
        if row is not None and row.holder.startswith(f"{socket.gethostname()}:{pid}:"):
            queries.leases.renew_lease(s, row.name, row.holder, row.token, TRAINING_LEASE_SECONDS)
