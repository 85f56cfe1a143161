"""Requests whose consent we could not read: served, counted, not learnt from, and told.

SGLang can be asked by more than its HTTP server: gRPC, workers that another server program starts,
its Python engine. What comes that way has no stamp (see ``labels``). And a client can write into
``x-aurora-train`` what is neither a yes nor a no.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from aurora_sgl.engine import labels

logger = logging.getLogger("aurora_sgl")

NOTICE = "consent"
UNREADABLE = "consent values"
#: A notice stays for so long after the last such request.
NOTICE_SECONDS = 3600.0

_WHY = {
    NOTICE: "because nobody could see the x-aurora headers on the way in (gRPC, HTTP/2 with "
    "several workers and SGLang's Python engine have no place to look).",
    UNREADABLE: "because their x-aurora-train says neither yes (yes, true, 1, on) nor no (no, "
    "false, 0, off): what can't be read counts as a no.",
}


class Consent:
    """One per leading rank. ``notices`` is what the heartbeat tells (see ``wire.Hello``)."""

    def __init__(
        self, notices: MutableMapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counts = dict.fromkeys(_WHY, 0)  # requests since the start
        self._notices, self._clock = notices, clock
        self._last = dict.fromkeys(_WHY, 0.0)

    @property
    def unstamped(self) -> int:
        """Requests whose headers nobody saw."""
        return self._counts[NOTICE]

    @property
    def unreadable(self) -> int:
        """Requests whose consent could not be read."""
        return self._counts[UNREADABLE]

    def take(self, received: Any) -> labels.Labels:
        """What a request says, which is taken off it."""
        request_labels = labels.take(received.sampling_params)
        if not request_labels.stamped and not str(received.rid).startswith("HEALTH_CHECK"):
            self._tell(NOTICE)
        if request_labels.unreadable and request_labels.prompt_of is None:
            self._tell(UNREADABLE)
        return request_labels

    def forget_old(self) -> None:
        """Take a notice back when the last such request is long ago."""
        for kind, last in self._last.items():
            if self._clock() - last >= NOTICE_SECONDS:
                self._notices.pop(kind, None)

    def _tell(self, kind: str) -> None:
        self._counts[kind] += 1
        self._last[kind] = self._clock()
        count = self._counts[kind]
        requests = "one request" if count == 1 else f"{count} requests"
        line = f"Nothing is learnt from {requests} of this server, {_WHY[kind]}"
        self._notices[kind] = line
        if count == 1:
            logger.warning("aurora: %s This is said once.", line)
