"""The switchback trial: live version and candidate take turns on the same servers and traffic.

Replay can't measure throughput. A trial can: short windows, in pairs of random order, so that
both versions see the same load, and a comparison by window. It is no deployment: servers follow
the version of the open window (``queries.aliases.wanted_version``) and go back to the live one by
themselves when nobody opens the next. :func:`tick` carries a trial on from the store alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import TrialSettings
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.intervals import accept_length, or_none
from aurora_sgl.rollout.live_traffic import key_of, paces
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation, Trial, TrialWindow

#: Seconds that servers stay with the version of a window that nobody closed.
GRACE_SECONDS = 10.0
#: Verify steps with drafts that a window needs to count, and pairs that a verdict needs.
FEWEST_STEPS, FEWEST_PAIRS = 20, 3


@dataclass(frozen=True)
class TrialStatus:
    """A trial with its windows so far, and its evaluation once it is finished."""

    trial: Trial
    windows: Sequence[TrialWindow]
    evaluation: Evaluation | None = None

    @property
    def planned(self) -> int:
        return 2 * int(self.trial.details["settings"]["pairs"])

    @property
    def finished(self) -> int:
        """Windows that are over."""
        return sum(window.finished_at is not None for window in self.windows)

    def seconds_left(self, now: datetime) -> float | None:
        """Until its last window is over; ``None``: nobody opens the next one."""
        length = float(self.trial.details["settings"]["window_seconds"])
        left = (self.planned - self.finished) * length
        if not self.windows:
            return left
        last = self.windows[-1]
        if last.finished_at is None:
            gone = max(0.0, (now - last.started_at).total_seconds())
            return None if gone > length + GRACE_SECONDS else left - min(length, gone)
        return None if (now - last.finished_at).total_seconds() > GRACE_SECONDS else left


@dataclass(frozen=True)
class TrialPlan:
    """What was started, or with ``dry_run`` would be started."""

    trial_id: int | None
    baseline_id: int
    candidate_id: int
    windows: int
    seconds: float
    dry_run: bool


def start(
    engine: Engine,
    candidate_id: int,
    *,
    actor: str,
    reason: str,
    settings: TrialSettings | None = None,
    seed: int = 0,
    dry_run: bool = False,
) -> TrialPlan:
    """Begin a trial of a version against the live one of its group.

    Raises ``Refused`` when it is live itself, when nothing is, when its weights were pruned, when
    another trial or a watch runs, or when no server is there, and ``AuroraError`` for an unknown
    version, actor or reason missing.
    """
    if not actor.strip() or not reason.strip():
        raise AuroraError("a trial needs an actor and a reason (--reason)")
    chosen = settings or TrialSettings()
    with store.session(engine) as s:
        candidate = queries.versions.version(s, candidate_id)
        group = queries.groups.lock_group(s, candidate.group_id)
        live = queries.aliases.aliases(s, group.id).get("live")
        _require(s, group.id, candidate_id, live)
        if candidate.pruned_at is not None:
            raise Refused(f"the weights of version {candidate_id} were deleted")
        assert live is not None
        trial_id = None
        if not dry_run:
            details = {"settings": chosen.model_dump(mode="json"), "actor": actor, "reason": reason}
            trial_id = queries.trials.add_trial(
                s, group.id, baseline_id=live, candidate_id=candidate_id, seed=seed, details=details
            ).id
            queries.audit.add_audit(
                s, group.id, actor=actor, action="trial_start",
                subject=f"version {candidate_id}", reason=reason,
                after={"trial": trial_id, "baseline": live, "settings": details["settings"]},
            )  # fmt: skip
    seconds = 2 * chosen.pairs * chosen.window_seconds
    return TrialPlan(trial_id, live, candidate_id, 2 * chosen.pairs, seconds, dry_run)


def _require(s: Session, group_id: int, candidate_id: int, live: int | None) -> None:
    running, watch = (
        queries.trials.running_trial(s, group_id),
        queries.watches.running_watch(s, group_id),
    )
    stage = queries.stages.open_stage(s, group_id)
    if live is None:
        raise Refused("nothing is live in this group, so nothing can be tried against it")
    if live == candidate_id:
        raise Refused(f"version {candidate_id} is live; there is nothing to try it against")
    if running is not None:
        raise Refused(
            f"trial {running.id} of version {running.candidate_id} is running; wait or stop it"
        )
    if stage is not None:
        raise Refused(
            f"{queries.stages.where(stage)}; continue or abort that first (promote --continue, "
            "promote --abort)"
        )
    if watch is not None:
        raise Refused(
            f"version {watch.version_id} is being watched since its promotion; wait until that ends"
        )
    if not queries.servers.servers(s, group_id):
        raise Refused("no server of this group is running, so there is no traffic to try it on")


def stop(
    engine: Engine, group: str, *, actor: str, reason: str, dry_run: bool = False
) -> TrialStatus | None:
    """End the running trial without a verdict; ``None``: none is running."""
    if not actor.strip() or not reason.strip():
        raise AuroraError("stopping a trial needs an actor and a reason (--reason)")
    with store.session(engine) as s:
        group_id = queries.groups.lock_group(s, queries.groups.group_by_name(s, group).id).id
        trial = queries.trials.running_trial(s, group_id)
        if trial is None:
            return None
        if not dry_run:
            queries.trials.end_trial(
                s, trial, "stopped", verdict="", stopped_by=f"{actor}: {reason}"
            )
            queries.audit.add_audit(s, group_id, actor=actor, action="trial_stop",
                              subject=f"trial {trial.id}", reason=reason)  # fmt: skip
        return TrialStatus(trial, queries.trials.trial_windows(s, trial.id))


def status(engine: Engine, group: str) -> TrialStatus | None:
    """The newest trial of a group, running or not; ``None``: there was none."""
    with store.session(engine, write=False) as s:
        trials = queries.trials.trials(s, queries.groups.group_by_name(s, group).id, limit=1)
        return _status(s, trials[0]) if trials else None


def tick(engine: Engine, group_id: int, *, now: datetime | None = None) -> TrialStatus | None:
    """Close the window that is over and open the next; ``None``: no trial is running.

    After the last one the windows are measured once more, when the records have come in, and the
    verdict is stored as an evaluation of the kind ``trial``.
    """
    moment = now or utc_now()
    with store.session(engine) as s:
        trial = queries.trials.running_trial(s, group_id)
        if trial is None:
            return None
        rules = TrialSettings.model_validate(trial.details["settings"])
        windows = list(queries.trials.trial_windows(s, trial.id))
        last = windows[-1] if windows else None
        if last is not None and last.finished_at is None:
            begun = min(last.started_at, moment)  # the clock may have gone back
            over = (moment - begun).total_seconds() >= rules.window_seconds
            if not over and last.started_at <= moment:
                return TrialStatus(trial, windows)
            last.finished_at = moment if last.started_at <= moment else last.started_at
            _measure(s, trial, last, rules)
        if len(windows) < 2 * rules.pairs:
            order = _order(trial.seed, rules.pairs)
            version = (trial.baseline_id, trial.candidate_id)[order[len(windows)]]
            ends = moment + timedelta(seconds=rules.window_seconds + GRACE_SECONDS)
            queries.trials.add_trial_window(s, trial.id, len(windows) + 1, version, moment, ends)
            return _status(s, trial)
        assert last is not None and last.finished_at is not None
        if (moment - last.finished_at).total_seconds() < GRACE_SECONDS / 2:
            s.flush()
            return _status(s, trial)
        for window in windows:
            _measure(s, trial, window, rules)
        return TrialStatus(trial, windows, _finish(s, trial, windows, rules))


def _status(s: Session, trial: Trial) -> TrialStatus:
    evaluations = queries.evaluations.evaluations(s, trial.candidate_id)
    mine = [e for e in evaluations if e.kind == "trial" and e.details.get("trial_id") == trial.id]
    return TrialStatus(trial, queries.trials.trial_windows(s, trial.id), mine[0] if mine else None)


def _order(seed: int, pairs: int) -> list[int]:
    """0 for the baseline, 1 for the candidate: each pair has both, in random order."""
    draw = random.Random(seed)
    return [which for _ in range(pairs) for which in draw.sample((0, 1), 2)]


def _measure(s: Session, trial: Trial, window: TrialWindow, rules: TrialSettings) -> None:
    """Sums over steps with drafts of the window's version, of requests prefilled under it."""
    assert window.finished_at is not None
    begin = window.started_at + timedelta(seconds=rules.warm_seconds)
    steps = queries.steps.steps_between(
        s, trial.group_id, window.version_id, begin, window.finished_at
    )
    pace = paces(steps).values()
    seconds = sum(each.seconds for each in pace)
    counted = (window.finished_at - begin).total_seconds()
    strata: dict[str, list[int]] = {}
    for step in steps:
        sums = strata.setdefault(key_of(step), [0, 0])
        sums[0], sums[1] = sums[0] + 1, sums[1] + step.accepted
    window.requests = len({step.request_id for step in steps})
    window.verify_steps = len(steps)
    window.accepted = sum(step.accepted for step in steps)
    window.completion_tokens = sum(step.kept for step in steps)
    window.metrics = {
        "seconds": counted,
        "accept_length": or_none(accept_length(window.accepted, len(steps))),
        "strata": strata,
        "tokens_per_second": window.completion_tokens / counted if counted > 0 else None,
        "stream_tokens_per_second": sum(p.tokens for p in pace) / seconds if seconds else None,
        "batch_size": sum(step.batch_size for step in steps) / len(steps) if steps else None,
    }
    s.flush()


def _finish(
    s: Session, trial: Trial, windows: Sequence[TrialWindow], rules: TrialSettings
) -> Evaluation:
    pairs = [
        (a, b) if a.version_id == trial.baseline_id else (b, a)
        for a, b in zip(windows[::2], windows[1::2], strict=True)
    ]
    whole = [pair for pair in pairs if all(w.verify_steps >= FEWEST_STEPS for w in pair)]
    lengths = _interval([_lengths(pair) for pair in whole], rules.level)
    speed = _interval(
        [
            (a.metrics["stream_tokens_per_second"], b.metrics["stream_tokens_per_second"])
            for a, b in whole
        ],
        rules.level,
    )
    verdict, reason = _verdict(whole, lengths, speed, rules)
    queries.trials.end_trial(s, trial, "finished", verdict=verdict, why=reason)
    return queries.evaluations.add_evaluation(
        s,
        candidate_id=trial.candidate_id,
        baseline_id=trial.baseline_id,
        kind="trial",
        requests=sum(pair[0].requests + pair[1].requests for pair in whole),
        verdict=verdict,
        candidate_accept_length=lengths.get("candidate"),
        baseline_accept_length=lengths.get("baseline"),
        difference=lengths.get("difference"),
        ci_low=lengths.get("ci_low"),
        ci_high=lengths.get("ci_high"),
        details={"trial_id": trial.id, "reason": reason, "pairs": len(whole),
                 "seed": trial.seed, "settings": trial.details["settings"],
                 "accept_length": lengths, "stream_tokens_per_second": speed},
    )  # fmt: skip


def _lengths(pair: tuple[TrialWindow, TrialWindow]) -> tuple[float | None, float | None]:
    """Accept lengths of two windows over the strata that both had (``live_traffic.key_of``), in one
    mix of them. A stratum weighs n m / (n + m) for n and m steps, the inverse of its variance
    (Mantel and Haenszel 1959): one step in one of the windows says little."""
    strata = [window.metrics["strata"] for window in pair]
    steps = [(strata[0][key][0], strata[1][key][0], key) for key in strata[0] if key in strata[1]]
    weights = {key: n * m / (n + m) for n, m, key in steps}
    total = sum(weights.values())
    if not total:
        return None, None
    first, second = (
        sum(weight * accept_length(*sums[key][::-1]) for key, weight in weights.items()) / total
        for sums in strata
    )
    return first, second


def _interval(pairs: Sequence[tuple[float | None, float | None]], level: float) -> dict[str, Any]:
    """Mean difference over pairs of windows, candidate less baseline, with Student's interval."""
    from scipy.special import stdtrit  # slow to import

    complete_pairs = [pair for pair in pairs if None not in pair]
    if len(complete_pairs) < FEWEST_PAIRS:
        return {"pairs": len(complete_pairs)}
    a, b = (np.array([pair[side] for pair in complete_pairs], dtype=float) for side in (0, 1))
    difference = b - a
    half = float(-stdtrit(len(complete_pairs) - 1, (1 - level) / 2) * difference.std(ddof=1))
    half /= len(complete_pairs) ** 0.5
    middle = float(difference.mean())
    return {
        "pairs": len(complete_pairs),
        "baseline": float(a.mean()),
        "candidate": float(b.mean()),
        "difference": middle,
        "ci_low": middle - half,
        "ci_high": middle + half,
    }


def _verdict(
    pairs: Sequence[object],
    lengths: dict[str, Any],
    speed: dict[str, Any],
    rules: TrialSettings,
) -> tuple[str, str]:
    """Pass: tokens per second of a stream are not lost beyond the margin, and more of them, or a
    longer accept length, are proven. Fail: either is proven worse."""
    if "difference" not in lengths or "difference" not in speed:
        return "inconclusive", f"{len(pairs)} whole pairs of windows, {FEWEST_PAIRS} needed"
    summary = (
        f"accept length {lengths['baseline']:.3f} -> {lengths['candidate']:.3f}, "
        f"{speed['baseline']:.1f} -> {speed['candidate']:.1f} tokens/s of a stream, "
        f"over {lengths['pairs']} pairs of windows"
    )
    floor = -rules.speed_margin * speed["baseline"]
    if speed["ci_high"] < floor or lengths["ci_high"] < 0:
        return "fail", f"{summary}: worse"
    if speed["ci_low"] > floor and (lengths["ci_low"] > 0 or speed["ci_low"] > 0):
        return "pass", f"{summary}: better"
    return "inconclusive", f"{summary}: not told apart"
