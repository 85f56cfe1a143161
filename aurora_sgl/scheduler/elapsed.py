"""How long ago something was, on a clock that may be set back."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta

from aurora_sgl.clock import utc_now

#: Seconds by which the clocks of two machines may differ before a moment counts as in the future.
SKEW_SECONDS = 5.0


class Elapsed:
    """Seconds since stored moments. A moment that lies in the future, because the clock was set
    back, counts from when this process first met it: nothing waits for the clock to catch up."""

    def __init__(
        self,
        now: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now = now
        self._monotonic = monotonic
        self._met: dict[datetime, float] = {}

    def since(self, moment: datetime) -> float:
        """Seconds, never negative."""
        age = (self.now() - moment).total_seconds()
        if age >= -SKEW_SECONDS:
            return max(0.0, age)
        return self._monotonic() - self._met.setdefault(moment, self._monotonic())

    def on_this_clock(self, moment: datetime) -> datetime:
        """The moment as the clock of today would have shown it."""
        return self.now() - timedelta(seconds=self.since(moment))
