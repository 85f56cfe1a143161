"""What a run says of itself while it goes on: stage, how far, time left, the curves so far.

Written into ``training_run.progress`` by a thread of its own, so that a store that is slow or away
neither stops nor slows the run. Of a run on several workers the process that leads it writes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event, RLock, Thread
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.rollout.run_progress import (
    CHOOSING,
    GATE,
    READING,
    SECOND_LOOK,
    STAGES,
    STORING,
    TRAINING,
)
from aurora_sgl.store import queries
from aurora_sgl.store.faults import in_words

#: Least seconds between two writes, and seconds after which an unchanged state is written again: a
#: sign of life.
WRITE_SECONDS, LIFE_SECONDS = 2.0, 10.0
#: Points of a curve.
MOST_POINTS = 200
#: Seconds that the end of a run waits for a write that goes on.
LAST_SECONDS = 2.0
#: Units of a stage after which its pace is known.
FEWEST = 2
#: Replays of the split for choosing that a search of the way makes at most
#: (``training.line_search``), beside the gate's two of each request.
_SEARCH = 5

log = logging.getLogger(__name__)


class Curve:
    """At most ``MOST_POINTS`` means over neighbours of what came so far."""

    def __init__(self) -> None:
        self.width = 1  # values that a point stands for
        self._points: list[tuple[float, float]] = []
        self._open: list[tuple[float, float]] = []  # of the next point

    def add(self, x: float, y: float) -> None:
        if not math.isfinite(y):
            return
        self._open.append((x, y))
        if len(self._open) < self.width:
            return
        self._points.append(_middle(self._open))
        self._open = []
        if len(self._points) == MOST_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_middle(pair) for pair in pairs]
            self.width *= 2

    def points(self) -> list[list[float]]:
        last = [_middle(self._open)] if self._open else []
        return [[round(x, 1), _rounded(y)] for x, y in [*self._points, *last]]


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return (
        sum(x for x, _ in points) / len(points),
        sum(y for _, y in points) / len(points),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


class RunReporter:
    """Takes the events of a run (``training.run``), in any thread. ``past``: what the stages of the
    last run took, see :meth:`stages`."""

    def __init__(
        self,
        engine: Engine,
        run_id: int,
        past: Mapping[str, Sequence[float]] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        every: float = WRITE_SECONDS,
    ) -> None:
        self._engine, self._run_id, self._every, self._clock = engine, run_id, every, clock
        self._past = dict(past or {})
        self._lock = RLock()
        self._stage, self._begun = READING, clock()
        self._done = self._total = self._first = 0
        self._took: dict[str, list[float]] = {}  # stage -> seconds, units
        self._requests = self._gate = self._dev = 0
        self._dev_seconds: float | None = None  # of one replay of the split for choosing
        self._last_update = clock()
        self._limit: float | None = None  # seconds that updates may still take
        self._curves = {name: Curve() for name in ("loss", "reward", "accept_length")}
        self._passes = 0
        self._changed = True
        self._failing = False
        self._over = Event()
        self._thread = Thread(target=self._work, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """No write begins after this."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(LAST_SECONDS)

    # -- what happens ------------------------------------------------------------------------

    def __call__(self, event: Mapping[str, Any]) -> None:
        take = getattr(self, f"_on_{event.get('event')}", None)
        if take is None:
            return
        with self._lock:
            take(event)
            self._changed = True

    def _on_reading(self, _: Mapping[str, Any]) -> None:
        self._enter(READING)

    def _on_second_look(self, event: Mapping[str, Any]) -> None:
        self._enter(SECOND_LOOK, int(event.get("done", 0)), int(event["requests"]))

    def _on_window(self, event: Mapping[str, Any]) -> None:
        self._requests, self._gate = int(event["requests"]), int(event["gate"])
        self._dev = int(event.get("dev", 0))
        self._enter(TRAINING)

    def _on_resumed(self, event: Mapping[str, Any]) -> None:
        """It goes on where it was killed: what it had done by then tells nothing of its pace."""
        done = int(event["update"])
        self._enter(TRAINING, done, int(event["updates"]))
        self._first, self._begun = done, self._clock()
        for name in ("loss", "reward"):
            values = event.get(name) or []
            for index, value in enumerate(values):
                self._curves[name].add(done * (index + 1) / len(values), value)
        self._take_lengths(event)

    def _on_update(self, event: Mapping[str, Any]) -> None:
        self._enter(TRAINING, int(event["update"]), int(event["updates"]))
        self._last_update = self._clock()
        self._limit = event.get("seconds_allowed")
        for name in ("loss", "reward"):
            if event.get(name) is not None:
                self._curves[name].add(self._done, float(event[name]))

    def _on_pass(self, event: Mapping[str, Any]) -> None:
        self._dev_seconds = self._clock() - self._last_update
        self._take_lengths(event)

    def _take_lengths(self, event: Mapping[str, Any]) -> None:
        lengths = event.get("dev_accept_length") or []
        for value in lengths[self._passes :]:
            if value is not None:
                self._curves["accept_length"].add(int(event["update"]), value)
        self._passes = len(lengths)

    def _on_line_search(self, event: Mapping[str, Any]) -> None:
        self._enter(CHOOSING, int(event["done"]), int(event["of"]))

    def _on_gate(self, event: Mapping[str, Any]) -> None:
        self._gate = int(event["requests"])
        self._enter(GATE, int(event.get("done", 0)), self._gate)

    def _on_storing(self, _: Mapping[str, Any]) -> None:
        self._enter(STORING)

    def _enter(self, stage: str, done: int = 0, total: int = 0) -> None:
        now = self._clock()
        if stage != self._stage:
            self._leave(now)
            self._stage, self._begun, self._first = stage, now, 0
        elif stage == TRAINING and not self._total and total:
            self._begun, self._first = now, done  # what starting took is no pace of updates
        self._done, self._total = done, total

    def _leave(self, now: float) -> None:
        before = self._took.get(self._stage, [0.0, 0])
        self._took[self._stage] = [round(before[0] + now - self._begun, 2), self._total]

    def stages(self) -> dict[str, list[float]]:
        """(seconds, units) that each stage took so far."""
        with self._lock:
            took = {name: list(each) for name, each in self._took.items()}
            before = took.get(self._stage, [0.0, 0])
            took[self._stage] = [round(before[0] + self._clock() - self._begun, 2), self._total]
            return took

    # -- time left ---------------------------------------------------------------------------

    def _stage_left(self) -> float | None:
        """Of the stage that goes on: by its own pace, or by what the last run took for it."""
        gone, done = self._clock() - self._begun, self._done - self._first
        if self._total and done >= FEWEST:
            left = gone / done * (self._total - self._done)
            if self._stage == TRAINING and self._limit is not None:
                left = min(left, self._limit)
            return left
        expected = self._expected(self._stage, self._total)
        return None if expected is None else max(0.0, expected - gone)

    def _expected(self, stage: str, units: int) -> float | None:
        """Seconds of a whole stage: by the replays that this run made, or by the last run."""
        if self._dev_seconds is not None and self._dev:
            if stage == CHOOSING:
                return _SEARCH * self._dev_seconds
            if stage == GATE:
                return 2 * self._dev_seconds * self._gate / self._dev
        seconds, before = (*self._past.get(stage, ()), 0.0, 0.0)[:2]
        if not seconds:
            return None
        if stage == GATE and before:
            return seconds / before * (units or self._gate)
        return seconds

    def _left(self) -> float | None:
        """Of the whole run; ``None`` until all that comes can be told."""
        left = self._stage_left()
        for stage in STAGES[STAGES.index(self._stage) + 1 :]:
            if left is None:
                return None
            if stage == SECOND_LOOK:
                continue  # there may be none
            expected = self._expected(stage, 0)
            if expected is None and stage == STORING:
                expected = 0.0  # it is short beside the others
            left = None if expected is None else left + expected
        return left

    # -- writing -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What is written: JSON of at most some kilobytes."""
        with self._lock:
            left, of_stage = self._left(), self._stage_left()
            return {
                "stage": self._stage,
                "done": self._done,
                "total": self._total,
                "requests": self._requests,
                "seconds_left": None if left is None else round(left, 1),
                "stage_seconds_left": None if of_stage is None else round(of_stage, 1),
                "updated_at": utc_now().isoformat(),
                "curves": {
                    name: points for name, curve in self._curves.items()
                    if (points := curve.points())
                },
            }  # fmt: skip

    def _work(self) -> None:
        written = -LIFE_SECONDS
        while not self._over.is_set():
            with self._lock:
                due, self._changed = self._changed, False
            if due or time.monotonic() - written >= LIFE_SECONDS:
                written = time.monotonic()
                self._write()
            self._over.wait(self._every)

    def _write(self) -> None:
        """Whatever is wrong with the store, the run goes on."""
        try:
            with store.session(self._engine) as s:
                queries.runs.note_progress(s, self._run_id, self.state())
        except Exception as error:
            if not self._failing:
                log.warning("the progress of run %d can't be stored, the run goes on: %s",
                            self._run_id, in_words(error))  # fmt: skip
            self._failing = True
        else:
            self._failing = False
