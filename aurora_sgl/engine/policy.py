"""Which requests carry drafts: those for which drafts pay, and a few that find out. And which shape
the drafts of a step have.

Whether drafts pay depends on how many requests run at once: verifying costs more the more rows a
step has already. So steps of every shape, and those without drafts, are timed by batch size, and
the drafter's accept length is taken from what it has just done, or from what the sidecar expects of
a new version. A step has the shape that brings most tokens per second, and drafts pay at a batch
size where the accept length in that shape exceeds the ratio of the two times.

Whether a request has drafts at all is chosen for the request, because one that was served without
them has no draft KV: it can lose drafts between two steps, but not get them back. What is not known
is found out by requests that try, within a bounded share of the steps and of the speed.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from statistics import median

from aurora_sgl import intervals
from aurora_sgl.batch_sizes import batch_bucket
from aurora_sgl.draft_shape import NO_DRAFT, DraftShape
from aurora_sgl.engine.step_times import StepTimings
from aurora_sgl.step_cost import MARGIN, is_worth, step_key

_ENTRY_FEE = 4.0  # steps charged at once, so that a burst of requests is not admitted as a whole
#: Steps; bounds what a quiet time saves up, and the debt of requests that asked for drafts.
_CREDIT_LIMIT = 256.0
#: Share of the speed that trying may cost where drafts are known to lose.
LOSS = 0.01
#: Steps for which a request that tries keeps its drafts where they are known to lose.
TRY_STEPS = 3
#: One try in 300 steps, whatever is known: it may be of a noisy minute.
AGAIN_SHARE = (_ENTRY_FEE + TRY_STEPS) / 300
#: Steps with drafts of one batch size between two plain ones that are made to time them again.
PROBE_STEPS = 48
_LIVE = 64.0  # steps of requests from which the live accept length counts
_MEMORY = 512.0  # steps of requests over which it is averaged
_AGAIN = 256  # steps with drafts of one batch size, among which every shape is made again
_AGAIN_STEPS = 4  # of one near the best
_FAR_STEPS = 2  # of one that is not
_NOISE = 1.25  # times as long as a larger shape
_NEAR = 0.9  # of the speed of the best shape


class Admission(Enum):
    """How a request begins."""

    PLAIN = "plain"
    TRIES = "tries"  # with drafts, to find out: it keeps them for TRY_STEPS steps at least
    DRAFTS = "drafts"  # with drafts, as long as they pay


def in_shape(accept_length: float, given: DraftShape, wanted: DraftShape) -> float:
    """The accept length of drafts of one shape where those of another have this one.

    As if every further token were accepted with the same probability p: 1 + p + ... + p^depth
    (Leviathan et al. 2023, equation 1), in a tree with 1 - (1 - p)^width instead.
    """
    low, high = 0.0, 1.0
    for _ in range(20):
        chance = (low + high) / 2
        if _expected(chance, given) < accept_length:
            low = chance
        else:
            high = chance
    return _expected(high, wanted)


def _expected(chance: float, shape: DraftShape) -> float:
    each = 1.0 - (1.0 - chance) ** shape.width
    return sum((each**level for level in range(shape.depth + 1)), 0.0)


class SpeculationPolicy:
    """The share of verify steps with drafts, what steps of each shape take, and what they bring.

    ``share``: 1 where drafts pay at some batch size, below it the bound of what may try; set by
    the sidecar, or by ``decide_alone``. ``by_size``: false where everything is to carry drafts as
    ``share`` says.
    ``shapes``: the shapes that a step may have, those that take longer last; the last is what the
    server was started with.
    """

    def __init__(
        self,
        share: float,
        *,
        by_size: bool = True,
        explore_share: float = 0.1,
        shapes: tuple[DraftShape, ...] = (DraftShape(1),),
    ) -> None:
        self.share = share
        self.by_size = by_size
        self.shapes = shapes
        self.plain_steps = 0
        self.speculative_steps = 0
        self._explore_share = explore_share
        self._credit = 1.0
        #: By shape and group of batch sizes, as all that is kept by ``group``.
        self.times = StepTimings()
        self._recent: deque[float] = deque(maxlen=64)  # of steps of any kind
        self._paying: dict[int, bool] = {}
        self._rounds: dict[int, int] = {}  # steps with drafts
        self._probed: dict[int, int] = {}  # how many there were at the last plain one among them
        self._swap_count = 0
        #: Steps and accepted drafts of the live version by shape, older ones count less.
        self._steps = dict.fromkeys(shapes, 0.0)
        self._accepted = dict.fromkeys(shapes, 0.0)
        self._expected_length: float | None = None
        self._lengths: dict[DraftShape, float | None] = {}  # known answers of accept_length

    @property
    def expected_accept_length(self) -> float | None:
        """Accept length of the live version in the last shape, before it was seen."""
        return self._expected_length

    @expected_accept_length.setter
    def expected_accept_length(self, accept_length: float | None) -> None:
        self._expected_length = accept_length
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
        """Whether running requests, but for those that try, keep their drafts in this step."""
        return not self.by_size or self.pays(batch_size) is not False

    def probes(self, batch_size: int) -> bool:
        """Whether a step whose requests carry drafts is made without, and keeps their draft KV:
        where only steps with drafts were seen, and now and then where drafts pay, so that what is
        known of plain steps stays true."""
        group = batch_bucket(batch_size)
        if not self.by_size or self.best(batch_size) is None:
            return False
        if self.times.of(NO_DRAFT, group) is not None:
            since = self._rounds.get(group, 0) - self._probed.get(group, 0)
            if since < PROBE_STEPS or self.pays(batch_size) is False:
                return False
        self._probed[group] = self._rounds.get(group, 0)
        return True

    def shape(self, batch_size: int) -> DraftShape:
        """The shape of this step's drafts: what pays best, or what has to be timed."""
        if len(self.shapes) == 1:
            return self.shapes[0]
        group = batch_bucket(batch_size)
        best, untimed = self.best(batch_size), self._untimed(group)
        if best is None:
            return self.shapes[0]
        if untimed is not None and self._best_case(untimed, group) > self._speed(best, group):
            return untimed
        return self._again(group, best) or best

    def _again(self, group: int, best: DraftShape) -> DraftShape | None:
        """A shape that is made once more in this step, so that what is known of it stays true."""
        place, least = self._rounds.get(group, 0) % _AGAIN, _NEAR * self._speed(best, group)
        near = [one for one in self.shapes if self._speed(one, group) >= least]
        if place < _AGAIN_STEPS * len(near):
            return near[place // _AGAIN_STEPS]
        far = [one for one in self.shapes if one not in near]
        place -= _AGAIN // 2
        return far[place // _FAR_STEPS] if 0 <= place < _FAR_STEPS * len(far) else None

    def best(self, batch_size: int) -> DraftShape | None:
        """The timed shape that brings most tokens per second at this batch size."""
        group = batch_bucket(batch_size)
        timed = [shape for shape in self.shapes if self.times.of(shape, group) is not None]
        return max(timed, key=lambda shape: self._speed(shape, group), default=None)

    def pays(self, batch_size: int) -> bool | None:
        """Whether drafts pay at this batch size; None: not known yet."""
        group = batch_bucket(batch_size)
        gain = self.gain(batch_size)
        if gain is None:
            return None
        self._paying[group] = is_worth(gain, speculates=self._paying.get(group, False))
        untimed, plain = self._untimed(group), self.times.plain(group)
        if self._paying[group] or untimed is None or plain is None:
            return self._paying[group]
        return None if self._best_case(untimed, group) * plain > MARGIN else False

    def gain(self, batch_size: int) -> float | None:
        """Speed with drafts of the best shape over that without; None until it is known."""
        best, plain = self.best(batch_size), self.times.plain(batch_bucket(batch_size))
        if best is None or plain is None or self.accept_length(best) is None:
            return None
        return self._speed(best, batch_bucket(batch_size)) * plain

    def break_even(self, batch_size: int) -> float | None:
        """Time of a step with drafts of the best shape over that of a plain one; None until both
        are known."""
        group, best = batch_bucket(batch_size), self.best(batch_size)
        plain = self.times.plain(group)
        drafts = self.times.of(best, group) if best is not None else None
        return drafts / plain if plain and drafts else None

    def accept_length(self, shape: DraftShape | None = None) -> float | None:
        """Of the live version in a shape, by default the last: as seen there, as what was seen in
        the shape closest to it says, or as the sidecar expects it."""
        wanted = self.shapes[-1] if shape is None else shape
        if wanted not in self._lengths:
            self._lengths[wanted] = self._length(wanted)
        return self._lengths[wanted]

    def _length(self, wanted: DraftShape) -> float | None:
        place = self.shapes.index
        candidates = [one for one in self.shapes if self._steps[one] >= _LIVE]
        if candidates:
            closest = min(
                candidates, key=lambda one: (abs(place(one) - place(wanted)), -place(one))
            )
            length = intervals.accept_length(self._accepted[closest], self._steps[closest])
        elif self._expected_length is not None:
            closest, length = self.shapes[-1], self._expected_length
        else:
            return None
        return length if closest == wanted else in_shape(length, closest, wanted)

    def _speed(self, shape: DraftShape, group: int) -> float:
        """Tokens of one request per second; 0: not timed."""
        took = self.times.of(shape, group)
        return (self.accept_length(shape) or 1.0) / took if took else 0.0

    def _untimed(self, group: int) -> DraftShape | None:
        """The first shape of which too few steps were timed at this batch size."""
        return next((shape for shape in self.shapes if self.times.of(shape, group) is None), None)

    def _best_case(self, shape: DraftShape, group: int) -> float:
        """What an untimed shape brings at most: it takes no less time than those before it, and
        than the few steps of its own that there were."""
        before = (NO_DRAFT, *self.shapes[: self.shapes.index(shape)])
        least = max(self.times.of(one, group) or 0.0 for one in before)
        least = max(least, self.times.least(shape, group))
        return (self.accept_length(shape) or 1.0) / least if least else float("inf")

    # -- what it is made from --------------------------------------------------------------------

    def account(self, *, shape: DraftShape, batch_size: int, seconds: float) -> None:
        """Count one step of the server, with drafts of this shape."""
        group = batch_bucket(batch_size)
        share, losing = self._trying_share(batch_size)
        credit = self._credit + share - float(shape.depth > 0)
        self._credit = max(-_CREDIT_LIMIT, min(credit, 1.0 if losing else _CREDIT_LIMIT))
        if shape.depth:
            self.speculative_steps += 1
            self._rounds[group] = self._rounds.get(group, 0) + 1
        else:
            self.plain_steps += 1
        self._recent.append(seconds)
        self.times.add(shape, group, seconds)
        self._forget_noise(shape, group)

    def _forget_noise(self, shape: DraftShape, group: int) -> None:
        """A smaller shape does not take longer: if it did, the machine was busy then."""
        took = self.times.of(shape, group)
        if took is not None and shape in self.shapes:
            for smaller in self.shapes[: self.shapes.index(shape)]:
                if (self.times.of(smaller, group) or 0.0) > _NOISE * took:
                    self.times.forget(smaller, group)

    def observe(self, swap_count: int, shape: DraftShape, steps: int, accepted: int) -> None:
        """Count steps of requests with drafts of one version and shape, and what they accepted."""
        self.swapped(swap_count)
        self._lengths.clear()
        past_steps = self._steps.get(shape, 0.0)
        keep = min(1.0, (_MEMORY - steps) / past_steps) if past_steps > 0 else 1.0
        self._steps[shape] = past_steps * keep + steps
        self._accepted[shape] = self._accepted.get(shape, 0.0) * keep + accepted

    def swapped(self, swap_count: int) -> bool:
        """Forget the old version's accept length if another one is live, and say so."""
        if swap_count == self._swap_count:
            return False
        self._swap_count = swap_count
        self._steps = dict.fromkeys(self.shapes, 0.0)
        self._accepted = dict.fromkeys(self.shapes, 0.0)
        self.expected_accept_length = None
        return True

    def decide_alone(self) -> None:
        """Where no sidecar does it: all requests carry drafts where these pay at some batch size,
        by the step times and the accept length that were measured here; else some try."""
        if self.by_size:
            answers = [self.pays(group) for group in self.times.groups]
            self.share = 1.0 if True in answers else self._explore_share

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
        return min(share, max(AGAIN_SHARE, LOSS / loss)), True

    def counters(self) -> dict[str, float]:
        """Step counts, the median duration of the last steps, and of either kind at the batch size
        for which both are known best; and for each group of batch sizes at which both are known, N
        the largest of it (``batch_bucket``), ``break_even_N``, ``depth_N`` and ``nodes_N`` of the
        best shape there, and ``gain_N``, the speed with drafts over that without; and what a step
        of each shape takes there (``step_cost.step_key``).

        ``step_ms_plain``, ``step_ms_spec`` and their ``gain`` (0: not known yet) are absent until
        both were seen at least 8 times.
        """
        result = {
            "plain_steps": float(self.plain_steps),
            "speculative_steps": float(self.speculative_steps),
            "hoped_accept_length": self.expected_accept_length or 0.0,
        }
        if sum(self._steps.values()) >= _LIVE:
            result["accept_length"] = intervals.accept_length(
                sum(self._accepted.values()), sum(self._steps.values())
            )
        if self._recent:
            result["step_ms"] = 1000 * median(self._recent)
        both = []
        for group in self.times.groups:
            needed, best, gain = self.break_even(group), self.best(group), self.gain(group)
            if needed is None or best is None:
                continue
            result[f"break_even_{group}"] = needed
            result[f"depth_{group}"] = float(best.depth)
            result[f"nodes_{group}"] = float(best.nodes)
            if gain is not None:
                result[f"gain_{group}"] = gain
            result |= self._step_times(group)
            samples = min(self.times.count(one, group) for one in (NO_DRAFT, best))
            plain, drafts = self.times.plain(group), self.times.of(best, group)
            both.append((samples, group, gain or 0.0, plain or 0.0, drafts or 0.0))
        if both:
            _, _, result["gain"], plain, drafts = max(both)
            result["step_ms_plain"], result["step_ms_spec"] = 1000 * plain, 1000 * drafts
        return result

    def _step_times(self, group: int) -> dict[str, float]:
        """Of each shape that was timed at this load, and of none."""
        times = {shape: self.times.of(shape, group) for shape in self.shapes}
        times[NO_DRAFT] = self.times.plain(group)
        return {
            step_key(group, shape.depth, shape.nodes): 1000 * took
            for shape, took in times.items()
            if took is not None
        }
