"""Which requests are traced: those whose whole trace fits what is left of three budgets.

A trace that is cut off in the middle is worth nothing, so a request is chosen before it is queued,
and the bytes that its trace may take are reserved until the sidecar has the trace. All numbers are
bytes. The scheduler's thread alone uses this.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

#: Beside a row: its token, twice, and what the assembler keeps for a chunk of some rows.
TOKEN_BYTES = 64
#: Bytes of a row while nothing is known: the widest target that there is.
UNKNOWN_ROW = 128 * 1024
#: An answer is expected to be as long as nine of ten were of the last ones, and some more; while
#: few are known, this long.
_QUANTILE, _MORE, _FIRST_ANSWER = 0.9, 1.1, 1024
_MEMORY, _FEW = 128, 8  # answers
#: Part of ``total_bytes`` that is left to requests which run and turn out longer than expected.
_FOR_GROWTH = 0.15
#: Seconds after which a chosen request that never began gives its bytes back; if it begins later,
#: it asks again.
FORGOTTEN_SECONDS = 60.0
_BURST_SECONDS = 4.0  # what a quiet time saves up
#: Part of the steps' time that capture may take in the scheduler's thread.
SHARE = 0.01
_WINDOW_STEPS = 64
_RECOVERY, _LEAST = 1.05, 1 / 64


@dataclass(slots=True, eq=False)
class OpenTrace:
    """One request whose hidden states are captured, from its first prefill on."""

    request_id: int
    output_start: int
    greedy: bool
    reserved: int  # bytes
    used: int = 0  # bytes handed to the copier
    broken: bool = False  # no more rows are taken
    #: Set by the copier: the ring's position at which the sidecar has all that will ever come.
    done_at: int | None = None


@dataclass(slots=True)
class TraceBudget:
    """``request_bytes``: of one trace; ``total_bytes``: of all that are not finished;
    ``bytes_per_second``: on average."""

    row_bytes: int
    request_bytes: int
    total_bytes: int
    bytes_per_second: int
    clock: Callable[[], float] = time.monotonic
    admitted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    reserved: int = 0
    #: Share of the requests that latency allows, in (0, 1].
    scale: float = 1.0
    _answers: deque[int] = field(default_factory=lambda: deque(maxlen=_MEMORY))  # lengths
    _long: int = _FIRST_ANSWER  # tokens of a long answer
    _usual: int = _FIRST_ANSWER  # of one of average length
    _credit: float = 0.0
    _level: float = 0.0
    _filled_at: float = 0.0
    _ticket: int = 0
    _chosen: dict[int, tuple[int, float]] = field(default_factory=dict)  # ticket -> bytes, when
    _closing: list[OpenTrace] = field(default_factory=list)
    _spent: float = 0.0  # seconds of capture in this window
    _steps: float = 0.0  # seconds of steps in it
    _counted: int = 0

    def __post_init__(self) -> None:
        self._level, self._filled_at = self._burst, self.clock()

    @property
    def _burst(self) -> float:
        return max(_BURST_SECONDS * self.bytes_per_second, float(self.request_bytes))

    def bytes_of(self, rows: int) -> int:
        return rows * (self.row_bytes + TOKEN_BYTES)

    # -- choosing --------------------------------------------------------------------------------

    def choose(self, prompt_tokens: int, max_new_tokens: int | None, waiting: int = 0) -> int:
        """A ticket for a request that is to be traced, 0 for another.

        ``waiting``: bytes of finished traces that the sidecar holds.
        """
        need = self.expected(prompt_tokens, max_new_tokens)
        reason = self._refusal(prompt_tokens, need, waiting)
        if reason:
            self.refused[reason] += 1
            return 0
        self.admitted += 1
        self._take(need)
        self._ticket += 1
        self._chosen[self._ticket] = (need, self.clock())
        return self._ticket

    def expected(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """Bytes of a request's trace: its prompt's, and those of a long answer. Where a long one
        would exceed one trace and a usual one does not, all that one trace may have."""
        most = max(0, max_new_tokens) if isinstance(max_new_tokens, int) else self._long
        need = self.bytes_of(prompt_tokens + min(self._long, most))
        usual = self.bytes_of(prompt_tokens + min(self._usual, most))
        return self.request_bytes if usual <= self.request_bytes < need else need

    def _refusal(self, prompt_tokens: int, need: int, waiting: int) -> str:
        self._refill()
        if self.bytes_of(prompt_tokens) > self.request_bytes:
            return "long_prompt"
        if need > self.request_bytes:
            return "long"
        room = max((1 - _FOR_GROWTH) * self.total_bytes, self.request_bytes)
        if self.reserved + waiting + need > room:
            return "memory"
        if self._level < need:
            return "rate"
        self._credit = min(2.0, self._credit + self.scale)
        if self._credit < 1.0:
            return "latency"
        self._credit -= 1.0
        return ""

    def _take(self, count: int) -> None:
        self.reserved += count
        self._level -= count

    def _refill(self) -> None:
        now = self.clock()
        gained = (now - self._filled_at) * self.bytes_per_second
        self._level, self._filled_at = min(self._burst, self._level + gained), now
        for ticket, (count, since) in list(self._chosen.items()):
            if now - since <= FORGOTTEN_SECONDS:
                break  # the later ones are younger
            del self._chosen[ticket]
            self._return(count, unused=count)

    def begin(self, ticket: int, prompt_tokens: int) -> int:
        """The bytes reserved for a request that begins now; 0: it can't be traced after all."""
        count, _ = self._chosen.pop(ticket, (0, 0.0))
        need = max(count, self.bytes_of(prompt_tokens))
        if need > count and not self._extend(need - count, need):
            self._return(count, unused=count)
            self.refused["outgrown"] += 1
            return 0
        return need

    def grow(self, trace: OpenTrace, count: int) -> bool:
        """Whether ``count`` more bytes may be handed over; reserves more if need be."""
        trace.used += count
        missing = trace.used - trace.reserved
        if missing <= 0:
            return True
        for extra in (max(missing, trace.reserved // 4), missing):
            if self._extend(extra, trace.reserved + extra):
                trace.reserved += extra
                return True
        return False

    def _extend(self, extra: int, whole: int) -> bool:
        """A request that runs is worth more than one to come: it may leave a debt of time."""
        if whole > self.request_bytes or self.reserved + extra > self.total_bytes:
            return False
        self._take(extra)
        return True

    # -- the end ---------------------------------------------------------------------------------

    def close(self, trace: OpenTrace) -> None:
        """Nothing more is handed over. The bytes stay reserved until the sidecar has them."""
        self._closing.append(trace)

    def settle(self, freed: int) -> None:
        """Give back what is reserved for traces that the sidecar has, as far as ``freed``."""
        left = []
        for trace in self._closing:
            if trace.done_at is None or trace.done_at > freed:
                left.append(trace)
            else:
                self._return(trace.reserved, unused=max(0, trace.reserved - trace.used))
        self._closing = left

    def _return(self, count: int, *, unused: int) -> None:
        self.reserved -= count
        self._level = min(self._burst, self._level + unused)

    def answered(self, tokens: int) -> None:
        """An answer ended with this length."""
        self._answers.append(tokens)
        if len(self._answers) >= _FEW:
            lengths = sorted(self._answers)
            self._long = math.ceil(_MORE * lengths[int(_QUANTILE * len(lengths))]) + 16
            self._usual = math.ceil(sum(lengths) / len(lengths))

    # -- latency ---------------------------------------------------------------------------------

    def spent(self, seconds: float) -> None:
        """Capture took this long in the scheduler's thread."""
        self._spent += seconds

    def stepped(self, seconds: float) -> None:
        """A decode step took this long. Where capture takes more than a hundredth of the steps of
        a window, half as many requests are traced; then slowly more again."""
        self._steps += seconds
        self._counted += 1
        if self._counted < _WINDOW_STEPS:
            return
        if self._spent > SHARE * self._steps:
            self.scale = max(_LEAST, self.scale / 2)
        else:
            self.scale = min(1.0, self.scale * _RECOVERY)
        self._spent, self._steps, self._counted = 0.0, 0.0, 0
