"""Which requests carry drafts, and how deep: those for which drafts pay, and a few that find out.

Whether drafts pay depends on how many requests run at once: verifying costs more the more rows a
step has already. So steps of every depth, 0 without drafts, are timed by batch size, and the
drafter's accept length is taken from what it has just done, or from what the sidecar expects of a
new version. A step is as deep as brings most tokens per second, and drafts pay at a batch size
where the accept length at that depth exceeds the ratio of the two times.

Whether a request has drafts at all is chosen for the request, because one that was served without
them has no draft KV: it can lose drafts between two steps, but not get them back. What is not known
is found out by requests that try, within a bounded share of the steps and of the speed.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from statistics import median

from aurora_sgl.engine.ladder import Rung

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
_AGAIN = 256  # steps with drafts of one batch size, among which depths near the best are made again
_AGAIN_STEPS = 4
_NEAR = 0.9  # of the speed at the best depth


class Admission(Enum):
    """How a request begins."""

    PLAIN = "plain"
    TRIES = "tries"  # with drafts, to find out: it keeps them for TRY_STEPS steps at least
    DRAFTS = "drafts"  # with drafts, as long as they pay


def bucket(batch_size: int) -> int:
    """Batch sizes 1, 2 to 3, 4 to 7, 8 to 15 and so on are each looked at as one."""
    return max(1, batch_size).bit_length()


def at_depth(accept_length: float, given: Rung, wanted: Rung) -> float:
    """The accept length of drafts of one shape where those of another have this one.

    As if every further token were accepted with the same probability p: 1 + p + ... + p^depth
    (Leviathan et al. 2023, equation 1), in a tree with 1 - (1 - p)^width instead.
    """
    low, high = 0.0, 1.0
    for _ in range(20):
        chance = (low + high) / 2
        if _length(chance, given) < accept_length:
            low = chance
        else:
            high = chance
    return _length(high, wanted)


def _length(chance: float, rung: Rung) -> float:
    each = 1.0 - (1.0 - chance) ** rung.width
    return sum((each**level for level in range(rung.depth + 1)), 0.0)


class SpeculationPolicy:
    """The share of verify steps with drafts, what steps of each depth take, and what they bring.

    ``share``: 1 where drafts pay at some batch size, below it the bound of what may try; set by
    the sidecar. ``by_size``: false where everything is to carry drafts as ``share`` says.
    ``rungs``: the shapes that a step may have, ascending; the last is what the server was started
    with.
    """

    def __init__(
        self,
        share: float,
        *,
        by_size: bool = True,
        explore_share: float = 0.1,
        rungs: tuple[Rung, ...] = (Rung(1, 2),),
    ) -> None:
        self.share = share
        self.by_size = by_size
        self._rungs = {rung.depth: rung for rung in rungs}
        self.depths = tuple(self._rungs)
        self.plain_steps = 0
        self.speculative_steps = 0
        self._explore_share = explore_share
        self._credit = 1.0
        self._durations: dict[tuple[int, int], deque[float]] = {}  # by depth and bucket
        self._medians: dict[tuple[int, int], float] = {}  # of those with _KNOWN steps
        self._recent: deque[float] = deque(maxlen=64)  # of steps of any kind
        self._paying: dict[int, bool] = {}
        self._rounds: dict[int, int] = {}  # steps with drafts by bucket
        self._swap_count = 0
        #: Steps and accepted drafts of the live version by depth, older ones count less.
        self._seen = dict.fromkeys(self.depths, 0.0)
        self._accepted = dict.fromkeys(self.depths, 0.0)
        self._hoped: float | None = None
        self._lengths: dict[int, float | None] = {}  # known answers of accept_length

    @property
    def hoped(self) -> float | None:
        """Accept length of the live version at the last depth, before it was seen."""
        return self._hoped

    @hoped.setter
    def hoped(self, accept_length: float | None) -> None:
        self._hoped = accept_length
        self._lengths.clear()

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
        if all(self._time(depth, at) is None for depth in self.depths):
            return True
        return self._time(0, at) is not None and self.pays(batch_size) is not False

    def depth(self, batch_size: int) -> int:
        """How deep the drafts of this step are: as pays best, or as has to be timed."""
        if len(self.depths) == 1:
            return self.depths[0]
        at = bucket(batch_size)
        untimed = self._untimed(at)
        best = self.best(batch_size)
        if untimed is not None and (
            best is None or self._hope(untimed, at) > self._speed(best, at)
        ):
            return untimed
        if best is None:
            return self.depths[0]
        turn = self._rounds.get(at, 0) % _AGAIN // _AGAIN_STEPS
        near = [one for one in self.depths if self._speed(one, at) >= _NEAR * self._speed(best, at)]
        return near[turn] if turn < len(near) else best

    def best(self, batch_size: int) -> int | None:
        """The timed depth that brings most tokens per second at this batch size."""
        at = bucket(batch_size)
        timed = [depth for depth in self.depths if self._time(depth, at) is not None]
        return max(timed, key=lambda depth: self._speed(depth, at), default=None)

    def pays(self, batch_size: int) -> bool | None:
        """Whether drafts pay at this batch size; None: not known yet."""
        at = bucket(batch_size)
        gain = self.gain(batch_size)
        if gain is None:
            return None
        bar = 1.0 if self._paying.get(at, False) else MARGIN
        self._paying[at] = gain > bar
        untimed = self._untimed(at)
        plain = self._time(0, at)
        if self._paying[at] or untimed is None or plain is None:
            return self._paying[at]
        return None if self._hope(untimed, at) * plain > MARGIN else False

    def gain(self, batch_size: int) -> float | None:
        """Speed with drafts of the best depth over that without; None until it is known."""
        best = self.best(batch_size)
        needed = self.break_even(batch_size)
        length = self.accept_length(best) if best is not None else None
        return length / needed if length is not None and needed is not None else None

    def break_even(self, batch_size: int) -> float | None:
        """Time of a step with drafts of the best depth over that of a plain one; None until both
        are known."""
        at, best = bucket(batch_size), self.best(batch_size)
        plain, drafts = self._time(0, at), self._time(best, at) if best is not None else None
        return drafts / plain if plain and drafts else None

    def accept_length(self, depth: int | None = None) -> float | None:
        """Of the live version at a depth, by default the last: as seen there, as what was seen at
        the depth closest to it says, or as the sidecar expects it."""
        wanted = self.depths[-1] if depth is None else depth
        if wanted not in self._lengths:
            self._lengths[wanted] = self._length(wanted)
        return self._lengths[wanted]

    def _length(self, wanted: int) -> float | None:
        seen = [one for one in self.depths if self._seen[one] >= _LIVE]
        if seen:
            closest = min(seen, key=lambda one: (abs(one - wanted), -one))
            length = 1.0 + self._accepted[closest] / self._seen[closest]
        elif self._hoped is not None:
            closest, length = self.depths[-1], self._hoped
        else:
            return None
        if closest == wanted:
            return length
        return at_depth(length, self._rungs[closest], self._rungs[wanted])

    def _speed(self, depth: int, at: int) -> float:
        """Tokens of one request per second; 0: not timed."""
        took = self._time(depth, at)
        return (self.accept_length(depth) or 1.0) / took if took else 0.0

    def _untimed(self, at: int) -> int | None:
        """The least depth of which too few steps were timed at this batch size."""
        return next((depth for depth in self.depths if self._time(depth, at) is None), None)

    def _hope(self, depth: int, at: int) -> float:
        """What an untimed depth brings at most: it takes no less time than those before it."""
        least = max(self._time(one, at) or 0.0 for one in (0, *self.depths) if one < depth)
        return (self.accept_length(depth) or 1.0) / least if least else float("inf")

    # -- what it is made from --------------------------------------------------------------------

    def account(self, *, depth: int, batch_size: int, seconds: float) -> None:
        """Count one step of the server, 0 deep without drafts."""
        at = bucket(batch_size)
        share, losing = self._trying_share(batch_size)
        credit = self._credit + share - float(depth > 0)
        self._credit = max(-_CREDIT_LIMIT, min(credit, 1.0 if losing else _CREDIT_LIMIT))
        if depth:
            self.speculative_steps += 1
            self._rounds[at] = self._rounds.get(at, 0) + 1
        else:
            self.plain_steps += 1
        self._recent.append(seconds)
        seen = self._durations.setdefault((depth, at), deque(maxlen=64))
        seen.append(seconds)
        if len(seen) >= _KNOWN:
            self._medians[depth, at] = median(seen)

    def observe(self, swap_count: int, depth: int, steps: int, accepted: int) -> None:
        """Count steps of requests with drafts of one version and depth, and what they accepted."""
        self.swapped(swap_count)
        self._lengths.clear()
        seen = self._seen.get(depth, 0.0)
        keep = min(1.0, (_MEMORY - steps) / seen) if seen > 0 else 1.0
        self._seen[depth] = seen * keep + steps
        self._accepted[depth] = self._accepted.get(depth, 0.0) * keep + accepted

    def swapped(self, swap_count: int) -> None:
        """Forget the old version's accept length if another one is live."""
        if swap_count != self._swap_count:
            self._swap_count = swap_count
            self._seen = dict.fromkeys(self.depths, 0.0)
            self._accepted = dict.fromkeys(self.depths, 0.0)
            self.hoped = None

    def _trying_share(self, batch_size: int) -> tuple[float, bool]:
        """Share of the steps that may try, less where a step is known to lose more; and whether
        one is."""
        if not self.by_size:
            return self.share, False
        share = self.share if self.share < 1.0 else self._explore_share
        needed, best = self.break_even(batch_size), self.best(batch_size)
        length = (self.accept_length(best) if best is not None else None) or 1.0
        if needed is None or needed <= length:
            return share, False
        # The one that tries makes the step longer for all, and brings more for itself alone.
        loss = needed / (1.0 + (length - 1.0) / batch_size) - 1.0
        return min(share, LOSS / loss), True

    def _time(self, depth: int, at: int) -> float | None:
        return self._medians.get((depth, at))

    def counters(self) -> dict[str, float]:
        """Step counts, the median duration of the last steps, and of either kind at the batch size
        for which both are known best; and for each batch size at which both are known, N the least
        size of its bucket, ``break_even_N`` and ``depth_N`` of the best depth there, and
        ``gain_N``, the speed with drafts over that without.

        ``step_ms_plain``, ``step_ms_spec`` and their ``gain`` (0: not known yet) are absent until
        both were seen at least 8 times.
        """
        result = {
            "plain_steps": float(self.plain_steps),
            "speculative_steps": float(self.speculative_steps),
            "hoped_accept_length": self.hoped or 0.0,
        }
        if sum(self._seen.values()) >= _LIVE:
            result["accept_length"] = 1.0 + sum(self._accepted.values()) / sum(self._seen.values())
        if self._recent:
            result["step_ms"] = 1000 * median(self._recent)
        both = []
        for at in sorted({size for _, size in self._durations}):
            least = 1 << at - 1
            needed, best, gain = self.break_even(least), self.best(least), self.gain(least)
            if needed is None or best is None:
                continue
            result[f"break_even_{least}"], result[f"depth_{least}"] = needed, float(best)
            if gain is not None:
                result[f"gain_{least}"] = gain
            known = min(len(self._durations[0, at]), len(self._durations[best, at]))
            both.append((known, at, best, gain or 0.0))
        if both:
            _, at, best, result["gain"] = max(both)
            result["step_ms_plain"] = 1000 * median(self._durations[0, at])
            result["step_ms_spec"] = 1000 * median(self._durations[best, at])
        return result
