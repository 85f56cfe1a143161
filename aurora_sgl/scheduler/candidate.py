"""What becomes of a version that passed the gate: a trial if that is wished, then the promotion.

Read from the store each time, so that it does not matter which scheduler started the run, or
whether that one is still there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.config import SchedulerSettings, TrialSettings, WatchSettings
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout import freezes, stages, trial
from aurora_sgl.rollout.promote import promote, set_candidate
from aurora_sgl.rollout.switches import AUTO_PROMOTE
from aurora_sgl.scheduler.policy import TRIGGERS
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation

ACTOR = "scheduler"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waiting:
    """A version that may go live, and why it has not (empty: it just did)."""

    version_id: int
    reason: str


def pending(engine: Engine, group_id: int, *, with_trial: bool) -> Evaluation | None:
    """The evaluation by which a version that was never live passed against what is live now: the
    newest one's. With trials, only of one that no trial has turned down. A version that somebody
    trained by hand is left to them."""
    with store.session(engine, write=False) as s:
        live = queries.aliases.aliases(s, group_id).get("live")
        if live is None:
            return None
        for passed in queries.evaluations.passed_against(s, group_id, live, TRIGGERS):
            judged = (
                each.id
                for each in queries.evaluations.evaluations(s, passed.candidate_id)
                if (each.kind, each.domain, each.baseline_id) == ("replay", "", live)
            )
            if next(judged) != passed.id:
                continue  # judged again, and otherwise
            tried = queries.trials.trials_of(s, passed.candidate_id, live)
            if not with_trial or all(t.status == "running" or t.verdict == "pass" for t in tried):
                return passed
    return None


def carry_on(
    engine: Engine,
    group_id: int,
    evaluation: Evaluation,
    *,
    rules: SchedulerSettings,
    trials: TrialSettings,
    resting: bool,
    watching: WatchSettings | None = None,
) -> Waiting:
    """The next step of a version that passed the gate, if it may be taken now."""
    number, baseline = evaluation.candidate_id, evaluation.baseline_id
    with store.session(engine, write=False) as s:
        aliases = queries.aliases.aliases(s, group_id)
        servers = {row.name for row in queries.servers.servers(s, group_id)}
        hindrance = _hindrance(s, group_id, evaluation, rules)
        tried = queries.trials.trials_of(s, number, int(baseline or 0))
        by_trial = next((t for t in tried if t.verdict == "pass"), None)
        run = queries.versions.version(s, number).training_run_id
    if aliases.get("candidate") != number:
        set_candidate(engine, number, group_id)
    if resting or hindrance:
        return Waiting(number, hindrance or "it is the rest after a rollback")
    evidence: dict[str, Any] = {"training_run_id": run, "replay": _numbers(evaluation)}
    try:
        if trials.automatic and by_trial is None:
            trial.start(
                engine,
                number,
                actor=ACTOR,
                reason=f"it passed the gate (evaluation {evaluation.id})",
                settings=trials,
                seed=evaluation.id,
            )
            return Waiting(number, "its trial has begun")
        if by_trial is not None:
            evidence["trial_id"] = by_trial.id
        if rules.stage.strip() and len(servers) > 1:
            plan = stages.start(
                engine, number, rules.stage, actor=ACTOR, reason=_reason(evaluation),
                goes_on=True, expected_live=baseline, settings=watching,
            )  # fmt: skip
            return Waiting(number, f"it has begun on {', '.join(plan.servers)}")
        change = promote(
            engine,
            number,
            actor=ACTOR,
            reason=_reason(evaluation),
            expected_live=baseline,
            evaluation_id=evaluation.id,
            evidence=evidence,
            only_if_on=AUTO_PROMOTE,
        )
    except AuroraError as refusal:
        return Waiting(number, str(refusal))
    log.info("version %d is live (generation %d)", number, change.generation)
    return Waiting(number, "")


def _hindrance(s: Session, group_id: int, evaluation: Evaluation, rules: SchedulerSettings) -> str:
    """Why nothing may go live by itself now, or not this version; "": it may."""
    if not queries.switches.is_on(s, group_id, AUTO_PROMOTE):
        return f"{AUTO_PROMOTE} is switched off"
    if frozen := freezes.refusal(s, group_id):
        return f"the group is {frozen}"
    stage = queries.stages.open_stage(s, group_id)
    if stage is not None:
        return f"version {stage.version_id} is on {', '.join(stage.servers)} first"
    number, baseline = evaluation.candidate_id, int(evaluation.baseline_id or 0)
    earlier = queries.stages.stages_of(s, number, baseline)
    if earlier and earlier[0].status == "aborted":
        return f"its stage was aborted {earlier[0].outcome}; somebody may promote it by hand"
    watch = queries.watches.running_watch(s, group_id)
    if watch is not None and rules.wait_for_watch:
        return f"version {watch.version_id} is still being watched"
    running = queries.trials.running_trial(s, group_id)
    return f"trial {running.id} is running" if running is not None else ""


def _reason(evaluation: Evaluation) -> str:
    before, after = evaluation.baseline_accept_length, evaluation.candidate_accept_length
    return f"replay on {evaluation.requests} held-out requests: {before:.3f} -> {after:.3f}"


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    names = ("id", "requests", "baseline_accept_length", "candidate_accept_length", "difference",
             "ci_low", "ci_high", "verdict", "attempt", "alpha")  # fmt: skip
    return {name: getattr(evaluation, name) for name in names}
