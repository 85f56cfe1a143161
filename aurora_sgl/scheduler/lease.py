"""One scheduler of a group at a time, whatever dies, hangs or sets its clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store import queries
from aurora_sgl.store.liveness import name_of_this_process


@dataclass(frozen=True)
class Hold:
    """``fresh``: it was taken in this call, and somebody else may have held it before."""

    held: bool
    fresh: bool
    holder: str


class Leadership:
    """A lease that is renewed by calling :meth:`hold` again and again.

    It is renewed from the loop that does the work, so a loop that hangs loses it. A contender
    takes a lease that has expired. It also takes one that did not change for the lease's length
    on its own steady clock: an expiry that lies hours ahead, because its holder's clock was set
    back before it died, keeps nobody waiting.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        *,
        holder: str = "",
        now: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.seconds = name, seconds
        self.holder = holder or name_of_this_process()
        self._now, self._monotonic = now, monotonic
        self._token = 0
        self._stamp: tuple[int, datetime] | None = None  # its token and expires_at, as last read
        self._stamp_at = 0.0  # monotonic, when it was first read
        self._renewed = 0.0

    def hold(self, s: Session) -> Hold:
        """Renew it when a fifth of it is over, or try to take it; one short transaction."""
        before = self._token
        if before and self._monotonic() - self._renewed < self.seconds / 5:
            return Hold(True, False, self.holder)
        if before and queries.leases.renew_lease(
            s, self.name, self.holder, before, self.seconds, self._now()
        ):
            self._renewed = self._monotonic()
            return Hold(True, False, self.holder)
        token = queries.leases.acquire_lease(s, self.name, self.holder, self.seconds, self._now())
        if token is None:
            token = self._take_over(s)
        if token is None:
            self._token = 0
            row = queries.leases.lease(s, self.name)
            return Hold(False, False, row.holder if row is not None else "")
        self._token, self._stamp, self._renewed = token, None, self._monotonic()
        return Hold(True, not before or token != before + 1, self.holder)

    def _take_over(self, s: Session) -> int | None:
        row = queries.leases.lease(s, self.name)
        if row is None:
            return None
        stamp = (row.token, row.expires_at)
        if stamp != self._stamp:
            self._stamp, self._stamp_at = stamp, self._monotonic()
            return None
        if self._monotonic() - self._stamp_at < self.seconds:
            return None
        return queries.leases.take_lease_over(
            s, self.name, self.holder, self.seconds, stamp, self._now()
        )

    def release(self, s: Session) -> None:
        """Let the next one have it at once."""
        if self._token:
            queries.leases.release_lease(s, self.name, self.holder, self._token)
            self._token = 0
