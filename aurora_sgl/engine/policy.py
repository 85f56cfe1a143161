"""Which requests carry drafts: those for which drafts pay, and a few that find out.

Whether drafts pay depends on how many requests run at once: verifying costs more the more rows a
step has already. So steps of either kind are timed by batch size, and the drafter's accept length
is taken from what it has just done, or from what the sidecar expects of a new version. Drafts pay
at a batch size where the accept length exceeds the ratio of the two times.

The choice is made per request, because a request that was served without drafts has no draft KV:
it can lose drafts between two steps, but not get them back. What is not known is found out by
requests that try, within a bounded share of the steps and of the speed.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from statistics import median

_ENTRY_FEE = 4.0  # steps charged at once, so that a burst of requests is not admitted as a whole
#: Steps; bounds what a quiet time saves up, and the debt of requests that asked for drafts.
_CREDIT_LIMIT = 256.0
#: Share of the speed that trying may cost where drafts are known to lose.
LOSS = 0.01
#: How far the accept length must be above break-even before drafts start. Where they ride already,
#: they go on until it falls below break-even itself, so that noise does not flip it.
MARGIN = 1.02
#: Steps for which a request that tries keeps its drafts where they are known to lose.
TRY_STEPS = 24
_KNOWN = 8  # steps of one kind from which their median counts
_LIVE = 64.0  # steps of requests from which the live accept length counts
_MEMORY = 512.0  # steps of requests over which it is averaged


class Admission(Enum):
    """How a request begins."""

    PLAIN = "plain"
    TRIES = "tries"  # with drafts, to find out: it keeps them for TRY_STEPS steps at least
    DRAFTS = "drafts"  # with drafts, as long as they pay


def bucket(batch_size: int) -> int:
    """Batch sizes 1, 2 to 3, 4 to 7, 8 to 15 and so on are each looked at as one."""
    return max(1, batch_size).bit_length()


class SpeculationPolicy:
    """The share of verify steps with drafts, what steps of either kind take, and what they bring.

    ``share``: 1 where drafts pay at some batch size, below it the bound of what may try; set by
    the sidecar. ``by_size``: false where everything is to carry drafts as ``share`` says.
    """

    def __init__(self, share: float, *, by_size: bool = True, explore_share: float = 0.1) -> None:
        self.share = share
        self.by_size = by_size
        self.hoped: float | None = None  # accept length of the live version before it was seen
        self.plain_steps = 0
        self.speculative_steps = 0
        self._explore_share = explore_share
        self._credit = 1.0
        self._durations: dict[tuple[bool, int], deque[float]] = {}
        self._recent: deque[float] = deque(maxlen=64)  # of steps of any kind
        self._paying: dict[int, bool] = {}
        self._swap_count = 0
        self._seen, self._accepted = 0.0, 0.0  # of the live version, older ones count less

    # -- the choice ------------------------------------------------------------------------------

    def admit(self, batch_size: int = 1) -> Admission:
        """How a request starts that makes the batch ``batch_size`` large."""
        if self.share >= 1.0 and (not self.by_size or self.pays(batch_size) is not False):
            return Admission.DRAFTS
        if self.share <= 0.0 or self._credit <= 0.0:
            return Admission.PLAIN
        self._credit -= _ENTRY_FEE
        return Admission.TRIES

    def keeps(self, batch_size: int) -> bool:
        """Whether running requests, but for those that try, keep their drafts in this step.

        A batch size at which only steps with drafts were seen is left to plain steps once, so that
        the two can be compared.
        """
        if not self.by_size:
            return True
        at = bucket(batch_size)
        if self._time(True, at) is None:
            return True
        return self._time(False, at) is not None and self.pays(batch_size) is not False

    def pays(self, batch_size: int) -> bool | None:
        """Whether drafts pay at this batch size; None: not known yet."""
        needed, length = self.break_even(batch_size), self.accept_length
        if needed is None or length is None:
            return None
        at = bucket(batch_size)
        bar = needed if self._paying.get(at, False) else needed * MARGIN
        self._paying[at] = length > bar
        return self._paying[at]

    def break_even(self, batch_size: int) -> float | None:
        """Time of a step with drafts over that of a plain one; None until both are known."""
        at = bucket(batch_size)
        plain, drafts = self._time(False, at), self._time(True, at)
        return drafts / plain if plain and drafts else None

    @property
    def accept_length(self) -> float | None:
        """Of the live version: as seen, or as the sidecar expects it before that."""
        if self._seen >= _LIVE:
            return 1.0 + self._accepted / self._seen
        return self.hoped

    # -- what it is made from --------------------------------------------------------------------

    def account(self, *, speculative: bool, batch_size: int, seconds: float) -> None:
        """Count one step of the server."""
        share, losing = self._trying_share(batch_size)
        credit = self._credit + share - float(speculative)
        self._credit = max(-_CREDIT_LIMIT, min(credit, 1.0 if losing else _CREDIT_LIMIT))
        if speculative:
            self.speculative_steps += 1
        else:
            self.plain_steps += 1
        self._recent.append(seconds)
        key = (speculative, bucket(batch_size))
        self._durations.setdefault(key, deque(maxlen=64)).append(seconds)

    def observe(self, swap_count: int, steps: int, accepted: int) -> None:
        """Count steps of requests with drafts of one version, and the drafts they accepted."""
        self.swapped(swap_count)
        keep = min(1.0, (_MEMORY - steps) / self._seen) if self._seen > 0 else 1.0
        self._seen = self._seen * keep + steps
        self._accepted = self._accepted * keep + accepted

    def swapped(self, swap_count: int) -> None:
        """Forget the old version's accept length if another one is live."""
        if swap_count != self._swap_count:
            self._swap_count, self._seen, self._accepted = swap_count, 0.0, 0.0
            self.hoped = None

    def _trying_share(self, batch_size: int) -> tuple[float, bool]:
        """Share of the steps that may try, less where a step is known to lose more; and whether
        one is."""
        if not self.by_size:
            return self.share, False
        share = self.share if self.share < 1.0 else self._explore_share
        needed = self.break_even(batch_size)
        length = self.accept_length or 1.0
        if needed is None or needed <= length:
            return share, False
        # The one that tries makes the step longer for all, and brings more for itself alone.
        loss = needed / (1.0 + (length - 1.0) / batch_size) - 1.0
        return min(share, LOSS / loss), True

    def _time(self, speculative: bool, at: int) -> float | None:
        seen = self._durations.get((speculative, at), ())
        return median(seen) if len(seen) >= _KNOWN else None

    def counters(self) -> dict[str, float]:
        """Step counts, the median duration of the last steps, and of either kind at the batch size
        for which both are known best; and for each batch size at which both are known
        ``break_even_N``, N the least size of its bucket.

        ``step_ms_plain`` and ``step_ms_spec`` are absent until both were seen at least 8 times.
        """
        result = {
            "plain_steps": float(self.plain_steps),
            "speculative_steps": float(self.speculative_steps),
            "hoped_accept_length": self.hoped or 0.0,
        }
        if self._seen >= _LIVE:
            result["accept_length"] = 1.0 + self._accepted / self._seen
        if self._recent:
            result["step_ms"] = 1000 * median(self._recent)
        sizes = sorted({size for _, size in self._durations})
        both = []
        for at in sizes:
            needed = self.break_even(1 << at - 1)
            if needed is not None:
                result[f"break_even_{1 << at - 1}"] = needed
                both.append(
                    (min(len(self._durations[False, at]), len(self._durations[True, at])), at)
                )
        if both:
            at = max(both)[1]
            result["step_ms_plain"] = 1000 * median(self._durations[False, at])
            result["step_ms_spec"] = 1000 * median(self._durations[True, at])
        return result
