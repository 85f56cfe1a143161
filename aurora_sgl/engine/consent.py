"""Requests whose headers nobody saw: served, counted, not learnt from, and told.

SGLang can be asked by more than its HTTP server: gRPC, workers that another server program starts,
its Python engine. What comes that way has no stamp (see ``labels``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from aurora_sgl.engine import labels

logger = logging.getLogger("aurora_sgl")

NOTICE = "consent"
#: The notice stays for so long after the last such request.
NOTICE_SECONDS = 3600.0


class Consent:
    """One per leading rank. ``notices`` is what the heartbeat tells (see ``wire.Hello``)."""

    def __init__(
        self, notices: MutableMapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.unstamped = 0  # requests since the start
        self._notices, self._clock = notices, clock
        self._last = 0.0

    def take(self, received: Any) -> labels.Labels:
        """What a request says, which is taken off it."""
        request_labels = labels.take(received.sampling_params)
        if not request_labels.stamped and not str(received.rid).startswith("HEALTH_CHECK"):
            self._tell()
        return request_labels

    def forget_old(self) -> None:
        """Take the notice back when the last such request is long ago."""
        if self._clock() - self._last >= NOTICE_SECONDS:
            self._notices.pop(NOTICE, None)

    def _tell(self) -> None:
        self.unstamped += 1
        self._last = self._clock()
        one = self.unstamped == 1
        self._notices[NOTICE] = (
            f"Nothing is learnt from {'one request' if one else f'{self.unstamped} requests'} of "
            "this server, because nobody could see the x-aurora headers on the way in (gRPC, "
            "HTTP/2 with several workers and SGLang's Python engine have no place to look)."
        )
        if one:
            logger.warning("aurora: %s This is said once.", self._notices[NOTICE])
