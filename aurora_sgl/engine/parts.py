"""Our own work inside SGLang's scheduler, part by part: each may fail, none stops serving.

A part that failed is left alone for a second, for two seconds after the next failure, and so on up
to five minutes; when it works again, all is as before. What failed is logged once per part and kind
of error, then rarely, and said in the heartbeat.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import TypeVar

from aurora_sgl.engine import clean

logger = logging.getLogger("aurora_sgl")

T = TypeVar("T")

FIRST_PAUSE = 1.0  # seconds
LONGEST_PAUSE = 300.0
#: For so long after its last failure a part's notice stays, so that somebody can see it.
NOTICE_SECONDS = 300.0
_LOG_SECONDS = 300.0  # between two lines about the same kind of error
_KINDS = 64  # of errors that are told apart


@dataclass(slots=True)
class _Part:
    failures: int = 0  # since the start
    in_a_row: int = 0
    failed_at: float = 0.0
    not_before: float = 0.0
    error: str = ""
    logged: dict[str, tuple[float, int]] = field(default_factory=dict)  # kind -> when, since then


class Parts:
    """``notices`` is what the heartbeat tells (see ``wire.Hello``)."""

    def __init__(
        self, notices: MutableMapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._notices = notices
        self._clock = clock
        self._parts: dict[str, _Part] = {}

    @property
    def failures(self) -> int:
        """Of all parts, since the start."""
        return sum(part.failures for part in self._parts.values())

    @property
    def down(self) -> int:
        """Parts that are left alone at this moment."""
        now = self._clock()
        return sum(part.not_before > now for part in self._parts.values())

    def attempt(self, name: str, work: Callable[[], T], otherwise: T, *, always: bool = False) -> T:
        """What ``work`` returns; ``otherwise`` when it fails or is left alone after a failure.

        ``always``: never leave it alone, since others wait for it.
        """
        part = self._parts.get(name)
        if part is not None and part.not_before > self._clock() and not always:
            return otherwise
        try:
            outcome = work()
        except Exception as error:
            self.failed(name, error)
            self._pause(self._parts[name])
            return otherwise
        if part is not None:
            part.in_a_row, part.not_before = 0, 0.0
        return outcome

    def failed(self, name: str, error: Exception) -> None:
        """Count, log and tell one failure, after which the part goes on: of one request alone."""
        part = self._parts.setdefault(name, _Part())
        part.failures += 1
        part.failed_at = self._clock()
        part.error = clean.text(f"{type(error).__name__}: {error}", 200)
        self._log(name, part, error)
        self._tell(name, part)

    def forget_old(self) -> None:
        """Take back the notices of parts that have gone well since."""
        now = self._clock()
        for name, part in self._parts.items():
            if part.failed_at and part.in_a_row == 0 and now - part.failed_at >= NOTICE_SECONDS:
                part.failed_at = 0.0
                self._notices.pop(f"failed: {name}", None)

    def _pause(self, part: _Part) -> None:
        pause = min(FIRST_PAUSE * 2.0 ** min(part.in_a_row, 20), LONGEST_PAUSE)
        part.in_a_row += 1
        part.not_before = part.failed_at + pause

    def _tell(self, name: str, part: _Part) -> None:
        times = "once" if part.failures == 1 else f"{part.failures} times"
        self._notices[f"failed: {name}"] = (
            f"{name[:1].upper()}{name[1:]} failed {times} in this server, the last time with "
            f'"{part.error}". It is tried again by itself; serving goes on.'
        )

    def _log(self, name: str, part: _Part, error: Exception) -> None:
        kind = type(error).__name__
        when, since = part.logged.get(kind, (-_LOG_SECONDS, 0))
        repeat = kind in part.logged
        if part.failed_at - when < _LOG_SECONDS or (not repeat and len(part.logged) >= _KINDS):
            part.logged[kind] = (when, since + 1)
            return
        part.logged[kind] = (part.failed_at, 0)
        if repeat:
            logger.warning(
                "aurora: %s failed %d more times (%s); serving goes on", name, since + 1, part.error
            )
        else:
            # What a client sent may stand in it: half an emoji ends a log that is strict UTF-8.
            report = "".join(traceback.format_exception(error)).encode(errors="backslashreplace")
            logger.error("aurora: %s failed; serving goes on\n%s", name, report.decode())
