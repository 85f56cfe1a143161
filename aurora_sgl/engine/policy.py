"""Which requests carry drafts while drafts do not pay yet.

An untrained drafter costs throughput, and training needs only the target's tokens and hidden
states. So a bounded share of the verify steps speculates until replay says that speculation pays;
the sidecar then sets the share to 1.

The choice is made per request, because a request that was served without drafts has no draft KV.
Credit accrues with every step and is spent by steps with drafts; a request is admitted to
speculation while credit is left and then keeps it to its end.
"""

from __future__ import annotations

from collections import deque
from statistics import median

_ENTRY_FEE = 4.0  # steps charged at once, so that a burst of requests is not admitted as a whole
#: Steps; bounds what a quiet time saves up, and the debt of requests that asked for drafts.
_CREDIT_LIMIT = 256.0


class SpeculationPolicy:
    """The share of verify steps with drafts, and what steps of either kind take."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._credit = 1.0
        self.plain_steps = 0
        self.speculative_steps = 0
        self._durations: dict[tuple[bool, int], deque[float]] = {}
        self._recent: deque[float] = deque(maxlen=64)  # of steps of any kind

    def admit(self) -> bool:
        """Whether a request that starts now speculates."""
        if self.share >= 1.0:
            return True
        if self.share <= 0.0 or self._credit <= 0.0:
            return False
        self._credit -= _ENTRY_FEE
        return True

    def account(self, *, speculative: bool, batch_size: int, seconds: float) -> None:
        """Count one step of the server."""
        credit = self._credit + self.share - float(speculative)
        self._credit = max(-_CREDIT_LIMIT, min(credit, _CREDIT_LIMIT))
        if speculative:
            self.speculative_steps += 1
        else:
            self.plain_steps += 1
        self._recent.append(seconds)
        key = (speculative, batch_size.bit_length())
        self._durations.setdefault(key, deque(maxlen=64)).append(seconds)

    def counters(self) -> dict[str, float]:
        """Step counts, the median duration of the last steps, and of either kind at the batch size
        for which both are known best.

        ``step_ms_plain`` and ``step_ms_spec`` are absent until both were seen at least 8 times.
        """
        result = {
            "plain_steps": float(self.plain_steps),
            "speculative_steps": float(self.speculative_steps),
        }
        if self._recent:
            result["step_ms"] = 1000 * median(self._recent)
        both = [
            (min(len(plain), len(self._durations[True, size])), size)
            for (speculative, size), plain in self._durations.items()
            if not speculative and (True, size) in self._durations
        ]
        if both and max(both)[0] >= 8:
            size = max(both)[1]
            result["step_ms_plain"] = 1000 * median(self._durations[False, size])
            result["step_ms_spec"] = 1000 * median(self._durations[True, size])
        return result
