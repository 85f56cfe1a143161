"""The scheduler's round, once a second: lead, obey the switches, look after what goes on, decide.

A round is short, whatever happens: training runs in a process of its own, and what it came to is
read from the store. So the lease that is renewed at the beginning of each round is lost only by a
scheduler that hangs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from aurora_sgl import store
from aurora_sgl.config import SchedulerSettings, TrialSettings, WatchSettings
from aurora_sgl.processes.training import TrainingProcess
from aurora_sgl.rollout import stages, trial, watch
from aurora_sgl.rollout.switches import LEARNING_WENT_OFF
from aurora_sgl.scheduler import candidate, load, policy
from aurora_sgl.scheduler.drift import DriftDetector, was_told
from aurora_sgl.scheduler.elapsed import Elapsed
from aurora_sgl.scheduler.facts import Pulse, facts, pulse, recipe_as_served
from aurora_sgl.scheduler.lease import Hold, Leadership
from aurora_sgl.scheduler.others import OtherRuns
from aurora_sgl.store import locks, queries
from aurora_sgl.store.ghosts import GhostWatch
from aurora_sgl.store.housekeeper import Housekeeper, Root
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.liveness import scheduler_lease_name

#: Seconds between two looks at what changes slowly: traffic, watch, drift, versions.
LOOK_SECONDS = 3.0
#: Seconds after which a state that did not change is written again: a sign of life.
REPEAT_SECONDS = 5.0
#: Requests of the live version that a new scheduler reads to know its accept length.
REBUILD_REQUESTS = 3000
#: Seconds between renewals of the lease of a paused run.
HOLD_SECONDS = 30.0

#: What a run does before and after its updates, by the event that it tells.
_DOING = {
    "line_search": "replaying the dev split to choose how far to go",
    "gate": "replaying held-out requests",
    "second_look": "judging the last candidate by what was served since",
    "storing": "storing the version and its verdict",
}
#: Events from which on a run is let come to its end: it is being judged.
_JUDGED = ("gate", "storing")

log = logging.getLogger(__name__)


class Scheduler:
    """The scheduler of one group. All calls from one thread."""

    def __init__(
        self,
        link: StoreLink,
        group: str,
        rules: SchedulerSettings,
        *,
        recipe: Mapping[str, Any] | None = None,
        trials: TrialSettings | None = None,
        watching: WatchSettings | None = None,
        environment: Mapping[str, str] | None = None,
        elapsed: Elapsed | None = None,
        files: Root | None = None,
    ) -> None:
        """``recipe``: knobs of training over those of ``rules``; ``environment``: of the run;
        ``files``: of weights and traces, without which no retention is done here."""
        self.link, self.group, self.rules = link, group, rules
        self.recipe = {**rules.recipe, **(recipe or {})}
        self.trials = trials or TrialSettings()
        self.watching = watching or WatchSettings()
        self.environment = dict(environment or {})
        self.elapsed = elapsed or Elapsed()
        self.group_id = 0
        self.hold = Hold(False, False, "")
        self.child: TrainingProcess | None = None
        self.trigger = ""  # of the run that goes on
        self.last_outcome: dict[str, Any] = {}
        self.details: dict[str, Any] = {}
        self.state = ""  # what was last said of it
        self._base_id: int | None = None  # live when the run began
        self._leadership: Leadership | None = None
        self._others: OtherRuns | None = None
        self._detector: tuple[int, DriftDetector] | None = None
        self._cursor: Any = None
        self._decision = policy.Decision("", policy.WAITING, "starting", "look at the triggers")
        self._candidate: candidate.Waiting | None = None
        self._stage: stages.StageStatus | None = None
        self._ghosts = GhostWatch()
        self._housekeeper = Housekeeper(link, files, "scheduler") if files is not None else None
        self._load = load.ServingLoad(load.FULL)
        self._other = ""
        self._looked = self._held_for = self._message_at = float("-inf")
        self._message: dict[str, Any] = {}
        self._turn = False  # half pace: every second round

    # -- the round ---------------------------------------------------------------------------

    def tick(self) -> None:
        """One round. Raises ``StoreAway``; what goes on then goes on."""
        if not self._lead():
            return
        with self.link.session(write=False) as s:
            now = pulse(s, self.group_id)
        self._load = load.load_of(now.servers, self.rules, self.elapsed)
        self._train_on(now)
        with self.link.guard() as engine:
            if now.trial_id is not None:
                trial.tick(engine, self.group_id, now=self.elapsed.now())
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            self._look(now)
        self._say(now)

    def look_now(self) -> None:
        """Leave nothing for the next slow look."""
        self._looked = float("-inf")

    def close(self) -> None:
        """End the run that goes on and let the next scheduler have the lease. Raises
        ``StoreAway``."""
        if self._housekeeper is not None:
            self._housekeeper.stop()
        if self.child is not None:
            self.child.end()
        if self.hold.held and self._leadership is not None:
            with self.link.session() as s:
                if self.child is not None:
                    queries.runs.explain_stop(s, self.group_id, "the scheduler ended")
                self._write(s, "stopped", "it was stopped", "nothing", None)
                self._leadership.release(s)
        self.child = None

    def _lead(self) -> bool:
        with self.link.session() as s:
            if not self.group_id:
                group_ids = {row.name: row.id for row in queries.groups.groups(s)}
                if self.group not in group_ids:
                    return False
                self.group_id = group_ids[self.group]
                self._others = OtherRuns(self.group_id)
                self._leadership = Leadership(
                    scheduler_lease_name(self.group_id),
                    self.rules.lease_seconds,
                    now=self.elapsed.now,
                )
            assert self._leadership is not None
            before, self.hold = self.hold, self._leadership.hold(s)
        if self.hold.held and self.hold.fresh:
            log.info("this scheduler leads group %s", self.group)
            self._detector = None
            self._message = {}
            self.look_now()
        if self.child is not None and (not self.hold.held or self.hold.fresh):
            self.child.stop(f"the lease went to {self.hold.holder}")
            self.child.end()
            self.child = None
        if not self.hold.held and (before.held or before.holder != self.hold.holder):
            log.info("standing by: %s leads group %s", self.hold.holder, self.group)
        return self.hold.held

    # -- training ----------------------------------------------------------------------------

    def _train_on(self, now: Pulse) -> None:
        """Look after the run that goes on."""
        child = self.child
        if child is None:
            return
        if not now.learning:
            child.stop(LEARNING_WENT_OFF)
        elif now.live_id != self._base_id and child.progress.get("event") not in _JUDGED:
            child.stop(f"version {now.live_id} went live meanwhile; the next run starts from it")
        elif self._must_pause():
            self._pause(child)
        else:
            child.resume()
        outcome = child.outcome()
        if outcome is None:
            return
        if child.stopped_because:
            with self.link.session() as s:
                queries.runs.explain_stop(s, self.group_id, child.stopped_because)
        self.child, self.last_outcome = None, outcome
        log.info("training %s: %s", outcome.get("status"), _summary(outcome))
        self.look_now()

    def _must_pause(self) -> bool:
        self._turn = not self._turn
        return self._load.pace == load.NONE or (self._load.pace == load.HALF and self._turn)

    def _pause(self, child: TrainingProcess) -> None:
        """Stop the process, but never inside a transaction that others wait for."""
        if not child.paused:
            child.pause()
            with self.link.guard() as engine:
                if not locks.is_free(engine, self.group_id):
                    child.resume()
                    return
        if time.monotonic() - self._held_for >= HOLD_SECONDS:
            self._held_for = time.monotonic()
            assert self._others is not None
            with self.link.session() as s:
                self._others.hold_for(s, child.pid)

    def _start(self, trigger: str, live_id: int | None) -> None:
        with self.link.session(write=False) as s:
            recipe = recipe_as_served(s, self.group_id, self.recipe, explore=self.rules.explore)
        arguments = ["--group", self.group, "--trigger", trigger, "--settings", json.dumps(recipe)]
        arguments.append("--continue")
        try:
            self.child = TrainingProcess(arguments, self.environment)
        except OSError as error:
            log.error("training can't be started: %s", error)
            return
        self.trigger, self.last_outcome, self._base_id = trigger, {}, live_id
        log.info("training started (%s): %s", trigger, self._decision.reason)

    # -- what changes slowly -----------------------------------------------------------------

    def _look(self, now: Pulse) -> None:
        assert self._others is not None
        with self.link.guard() as engine:
            watch.tick(engine, self.group_id, settings=self.watching, now=self.elapsed.now())
            self._stage = stages.tick(engine, self.group_id, now=self.elapsed.now())
            if self.rules.drift and now.live_id is not None:
                self._look_for_drift(now)
            with store.session(engine, write=False) as s:
                now = pulse(s, self.group_id)  # the watch may have rolled back
                group_facts = facts(s, self.group_id, now, self.elapsed)
            with store.session(engine) as s:
                self._other = "" if self.child else self._others.going_on(s, self.elapsed.now())
            self._decision = policy.decide(group_facts, self.rules)
            self.details = {
                "new_requests": group_facts.new_requests,
                "needed_requests": self.rules.requests,
                "drift": group_facts.drift,
            }
            resting = group_facts.since_rollback is not None and (
                group_facts.since_rollback < self.rules.cooldown_minutes * 60
            )
            self._promote_what_passed(engine, resting)
            self._ghosts.tick(engine, self.group_id)
        if self._housekeeper is not None:
            self._housekeeper.look(self.group_id)
        if self._candidate is not None and not self._candidate.reason:
            return  # it just went live, and a run starts from what is live: look again
        if self._decision.trigger and self.child is None and not self._other:
            if self._candidate is not None and self._candidate.reason and now.auto_promote:
                return  # what passed goes live first, else the next run starts from an old base
            if self._load.pace != load.NONE:
                self._start(self._decision.trigger, now.live_id)

    def _promote_what_passed(self, engine: Any, resting: bool) -> None:
        evaluation = candidate.pending(engine, self.group_id, with_trial=self.trials.automatic)
        if evaluation is None:
            self._candidate = None
            return
        self._candidate = candidate.carry_on(
            engine, self.group_id, evaluation, rules=self.rules, trials=self.trials,
            watching=self.watching, resting=resting,
        )  # fmt: skip
        if not self._candidate.reason:
            self.look_now()

    def _look_for_drift(self, now: Pulse) -> None:
        assert now.live_id is not None
        with self.link.session(write=False) as s:
            if self._detector is None or self._detector[0] != now.live_id:
                self._detector = (
                    now.live_id,
                    DriftDetector(self.rules.drift_threshold, self.rules.drift_slack),
                )
                drifts = queries.drifts.drifts(s, self.group_id, version_id=now.live_id)
                requests = queries.request_counts.request_counts(
                    s, self.group_id, now.live_id,
                    since=now.live_since, limit=REBUILD_REQUESTS, newest=True,
                )  # fmt: skip
            else:
                drifts = ()
                requests = queries.request_counts.request_counts(
                    s, self.group_id, now.live_id, after=self._cursor, limit=REBUILD_REQUESTS
                )
        if not requests:
            return
        self._cursor = (requests[-1].finished_at, requests[-1].request_id)
        falls = self._detector[1].feed(requests)
        with self.link.session() as s:
            for fall in falls:
                if was_told(fall, drifts):
                    continue  # whoever led before has seen it
                log.warning(
                    "accept length of version %d in %s: %.3f -> %.3f",
                    now.live_id, fall.domain, fall.accept_length_before, fall.accept_length_after,
                )  # fmt: skip
                queries.drifts.add_drift(
                    s,
                    self.group_id,
                    version_id=now.live_id,
                    domain=fall.domain,
                    last_request_id=fall.last_request_id,
                    accept_length_before=fall.accept_length_before,
                    accept_length_after=fall.accept_length_after,
                    requests_before=fall.requests_before,
                    requests_after=fall.requests_after,
                    details=fall.details,
                )

    # -- what people read --------------------------------------------------------------------

    def _say(self, now: Pulse) -> None:
        state, reason, action, next_in = self._state(now)
        self.state = state
        message = {"state": state, "reason": reason, "next_action": action}
        if message == self._message and time.monotonic() - self._message_at < REPEAT_SECONDS:
            return
        with self.link.session() as s:
            self._write(s, state, reason, action, next_in)
        self._message, self._message_at = message, time.monotonic()

    def _write(self, s: Any, state: str, reason: str, action: str, next_in: float | None) -> None:
        candidate_now = self._candidate
        details = {
            **self.details,
            "load": {"pace": self._load.pace, "reason": self._load.reason},
            "candidate": (
                {"version_id": candidate_now.version_id, "reason": candidate_now.reason}
                if candidate_now is not None
                else None
            ),
            "training": self.progress(),
            "last_outcome": {
                name: self.last_outcome.get(name)
                for name in ("run_id", "status", "version_id", "verdict", "reason", "error")
                if name in self.last_outcome
            },
        }
        until = self.elapsed.now() + timedelta(seconds=next_in) if next_in is not None else None
        queries.scheduler_states.set_scheduler_state(
            s,
            self.group_id,
            holder=self.hold.holder,
            state=state,
            reason=reason,
            next_action=action,
            next_at=until,
            details=details,
        )

    def progress(self) -> dict[str, Any] | None:
        """Of the run that goes on; ``None``: none does."""
        if self.child is None:
            return None
        return {
            "pid": self.child.pid,
            "trigger": self.trigger,
            "paused": self.child.paused,
            "seconds": round(time.monotonic() - self.child.started),
            **self.child.progress,
        }

    def _state(self, now: Pulse) -> tuple[str, str, str, float | None]:
        decision, waiting = self._decision, self._candidate
        if self.child is not None:
            event = self.child.progress.get("event")
            gate = event in (*_JUDGED, "second_look")
            doing = _DOING.get(str(event), f"training ({self.trigger})")
            if self._load.pace != load.FULL:
                how = "paused" if self._load.pace == load.NONE else "at half pace"
                doing = f"{doing}, {how}: {self._load.reason}"
            return ("gate" if gate else policy.TRAINING), doing, "judge what comes of it", None
        if self._other:
            return policy.TRAINING, f"a run of {self._other} goes on", "wait until it ends", None
        if now.trial_id is not None:
            return "trial", f"trial {now.trial_id} is running", "judge by its windows", None
        if self._stage is not None and self._stage.is_open:
            where = queries.stages.where(self._stage.stage)
            return "watch", f"{where}: {self._stage.sentence}", "judge it there", None
        if waiting is not None and waiting.reason:
            what = f"version {waiting.version_id} passed the gate"
            return policy.WAITING, f"{what}: {waiting.reason}", "promote it", None
        if decision.trigger and self._load.pace == load.NONE:
            return policy.WAITING, f"training is due, but {self._load.reason}", "train", None
        if now.watched is not None and decision.state == policy.WAITING:
            reason = f"version {now.watched} is being watched; {decision.reason}"
            return "watch", reason, decision.next_action, decision.next_in
        return decision.state, decision.reason, decision.next_action, decision.next_in


def _summary(outcome: Mapping[str, Any]) -> str:
    """What came of a run, and what the gate said of it and why."""
    if outcome.get("error"):
        return str(outcome["error"])
    verdict = f"{outcome.get('verdict', '')}: {outcome.get('reason', '')}"
    return f"version {outcome.get('version_id')}, {verdict}"
