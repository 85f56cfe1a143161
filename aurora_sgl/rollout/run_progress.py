"""How far the training run that goes on is: what its trainer wrote last, and whether it still does.

A trainer writes it into ``training_run.progress`` every two seconds (``training.reporter``). One
that was killed writes no more, and its run stays ``running`` until the next one ends it: so what is
written here is believed only while something holds the lease of training, or wrote lately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.store import queries
from aurora_sgl.store.liveness import is_silent, training_lease_name
from aurora_sgl.store.models import TrainingRun

READING, SECOND_LOOK, TRAINING = "reading", "second_look", "training"
CHOOSING, GATE, STORING = "choosing", "gate", "storing"
#: Stages in order; a second look is made only where there is a candidate to go on from.
STAGES = (READING, SECOND_LOOK, TRAINING, CHOOSING, GATE, STORING)
#: What each does, and what its numbers count.
WORDS = {
    READING: "reading requests",
    SECOND_LOOK: "judging the last candidate again",
    TRAINING: "training",
    CHOOSING: "choosing how far to go",
    GATE: "gate: replaying held-out requests",
    STORING: "storing the version",
}
UNITS = {
    SECOND_LOOK: "requests replayed",
    TRAINING: "updates",
    CHOOSING: "replays of the requests for choosing",
    GATE: "requests replayed",
}
NOT_KNOWN = "not told yet"


@dataclass(frozen=True)
class RunProgress:
    """A run's last word. ``seconds_left`` of the whole run and ``stage_seconds_left`` are as of
    ``updated_at``; ``None``: not told yet. ``total`` 0: the stage has nothing to count."""

    run_id: int
    trigger: str
    status: str
    started_at: datetime
    base_version_id: int | None
    stage: str = ""  # "": nothing was written yet
    done: int = 0
    total: int = 0
    requests: int = 0  # that are learnt from
    seconds_left: float | None = None
    stage_seconds_left: float | None = None
    updated_at: datetime | None = None
    silent: bool = False  # nothing was written for longer than a trainer is silent
    lost: bool = False  # and nothing holds the lease of training: its trainer is gone
    paused: str = ""  # why the scheduler stopped it for now
    curves: Mapping[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: TrainingRun, **more: Any) -> RunProgress:
        """What its row says; ``more``: what others say of it."""
        word = run.progress
        moment = word.get("updated_at")
        return cls(
            run.id, run.trigger, run.status, run.started_at, run.base_version_id,
            stage=str(word.get("stage", "")),
            done=int(word.get("done", 0)),
            total=int(word.get("total", 0)),
            requests=int(word.get("requests", 0)),
            seconds_left=word.get("seconds_left"),
            stage_seconds_left=word.get("stage_seconds_left"),
            updated_at=datetime.fromisoformat(moment) if moment else None,
            curves=word.get("curves") or {},
            **more,
        )  # fmt: skip

    @property
    def share(self) -> float | None:
        """Of the stage, in [0, 1]; ``None`` where nothing is counted."""
        return min(1.0, self.done / self.total) if self.total else None

    @property
    def doing(self) -> str:
        """``training, 120 of 400 updates``; a stage that this release doesn't know by its name."""
        words = WORDS.get(self.stage, self.stage or "starting")
        if not self.total:
            return words
        return f"{words}, {self.done:,} of {self.total:,} {UNITS.get(self.stage, '')}".strip()

    def left(self, now: datetime) -> float | None:
        """Seconds left of the whole run, by what it said and the time since."""
        return self._less_age(self.seconds_left, now)

    def stage_left(self, now: datetime) -> float | None:
        return self._less_age(self.stage_seconds_left, now)

    def _less_age(self, seconds: float | None, now: datetime) -> float | None:
        if seconds is None or self.updated_at is None or self.silent:
            return None
        return max(0.0, seconds - max(0.0, (now - self.updated_at).total_seconds()))

    def sentence(self, now: datetime) -> str:
        """One line for those who have no page."""
        if self.lost:
            since = self.updated_at or self.started_at
            return f"run {self.run_id} was not heard of since {since:%Y-%m-%d %H:%M:%S} UTC"
        left, of_stage = self.left(now), self.stage_left(now)
        if self.paused:
            time_left = f"paused: {self.paused}"
        elif self.silent:
            time_left = "it has said nothing lately"
        elif left is not None:
            time_left = f"about {left:.0f} s left"
        elif of_stage is not None:
            time_left = f"about {of_stage:.0f} s left of this stage"
        else:
            time_left = f"time left: {NOT_KNOWN}"
        return f"run {self.run_id} ({self.trigger}), {self.doing}; {time_left}"

    def as_json(self) -> dict[str, Any]:
        """Without the curves."""
        return {name: value for name, value in vars(self).items() if name != "curves"}


def going_on(engine: Engine, group_id: int) -> RunProgress | None:
    """The run of a group that goes on, as far as the store has it; ``None``: none does."""
    with store.session(engine, write=False) as s:
        rows = queries.runs.runs(s, group_id, status="running", limit=1)
        if not rows:
            return None
        lease = queries.leases.lease(s, training_lease_name(group_id))
        scheduler = queries.scheduler_states.scheduler_state(s, group_id)
    run, now = rows[0], utc_now()
    last = RunProgress.of(run).updated_at or run.started_at
    silent = is_silent(last, now)
    held = lease is not None and lease.expires_at > now
    training = (scheduler.details.get("training") if scheduler is not None else None) or {}
    paused = ""
    alive = scheduler is not None and not is_silent(scheduler.updated_at, now)
    if scheduler is not None and alive and training.get("paused"):
        paused = str((scheduler.details.get("load") or {}).get("reason") or "servers are busy")
    return RunProgress.of(run, silent=silent, lost=silent and not held, paused=paused)
