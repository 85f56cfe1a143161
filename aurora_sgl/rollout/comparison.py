"""What is known of two versions beside each other: where they come from, what made them differ, how
a replay, live traffic and a trial set them against each other.

Differences are the second version's less the first's, whichever of them was the candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout.replayed_pair import (
    Against,
    Replayed,
    RequestContrast,
    against,
    contrasts,
    replayed,
    turned,
)
from aurora_sgl.store import queries
from aurora_sgl.store.models import DrafterVersion, TrainingRun, Trial

#: Trials that are told of; the newest.
MOST_TRIALS = 3
#: Seconds between the word of a person to train and the start of the run.
_STARTS_WITHIN = timedelta(minutes=2)


@dataclass(frozen=True)
class VersionStep:
    """One version on the way down from an ancestor."""

    version_id: int
    parent_id: int | None
    created_at: datetime
    origin: str  # in words
    note: str
    pruned: bool


@dataclass(frozen=True)
class Ancestry:
    """``ways[i]``: version i and what it was made from, newest first, without ``common``, the
    ancestor that both have (``None``: they have none)."""

    common: int | None
    ways: tuple[list[VersionStep], list[VersionStep]]


@dataclass(frozen=True)
class RunFacts:
    """The training run that made a version. ``domains``: of the requests that are still stored."""

    run_id: int
    trigger: str
    objective: str
    base_version_id: int | None
    window_start: datetime | None
    window_end: datetime | None
    requests: int
    tokens: int
    domains: dict[str, int]


@dataclass(frozen=True)
class DifferingValue:
    """``None``: it has none. ``kind``: drafter, recipe or metric."""

    kind: str
    name: str
    values: tuple[Any, Any]


@dataclass(frozen=True)
class TrialTurn:
    """One window of a trial."""

    number: int
    version_id: int
    started_at: datetime
    requests: int
    verify_steps: int
    accept_length: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class TrialFacts:
    """A trial of one against the other."""

    trial_id: int
    status: str
    started_at: datetime
    finished_at: datetime | None
    verdict: str
    reason: str
    accept_length: tuple[float | None, float | None]
    difference: float | None  # of the accept length
    ci_low: float | None
    ci_high: float | None
    level: float | None
    turns: list[TrialTurn]


@dataclass(frozen=True)
class PairFacts:
    """All but what was served, see ``rollout.equal_shape``."""

    version_ids: tuple[int, int]
    ancestry: Ancestry
    runs: tuple[RunFacts | None, RunFacts | None]
    differing: list[DifferingValue]
    same_vocabulary: bool
    pruned: tuple[bool, bool]
    replays: list[Replayed]  # newest first
    against: Against | None  # where there are no replays
    trials: list[TrialFacts]
    contrasts: tuple[list[RequestContrast], list[RequestContrast]]  # worse, and better


def pair_facts(s: Session, group_id: int, one: int, other: int) -> PairFacts:
    """Raises ``AuroraError`` for versions that are not this group's, and for one with itself."""
    first, second = (version_of(s, group_id, version_id) for version_id in (one, other))
    if one == other:
        raise AuroraError(f"version {one} is the same as itself; name two versions")
    replays = queries.evaluations.between(s, one, other, "replay")
    return PairFacts(
        version_ids=(one, other),
        ancestry=ancestry(s, one, other),
        runs=(_run(s, first), _run(s, second)),
        differing=_differing(s, first, second),
        same_vocabulary=first.vocab_sha256 == second.vocab_sha256,
        pruned=(first.pruned_at is not None, second.pruned_at is not None),
        replays=[replayed(row, one) for row in replays],
        against=None if replays else against(s, one, other),
        trials=_trials(s, one, other),
        contrasts=contrasts(replays, one),
    )


def version_of(s: Session, group_id: int, version_id: int) -> DrafterVersion:
    """Raises ``AuroraError`` for one of another group as for one that is not there."""
    row = s.get(DrafterVersion, version_id) if 0 < version_id < 2**31 else None
    if row is None or row.group_id != group_id:
        raise AuroraError(f"there is no version {version_id} in this group")
    return row


# -- where they come from -----------------------------------------------------------------------


def ancestry(s: Session, one: int, other: int) -> Ancestry:
    lines = [queries.versions.lineage(s, version_id) for version_id in (one, other)]
    ids = [[row.id for row in line] for line in lines]
    common = next((version_id for version_id in ids[0] if version_id in set(ids[1])), None)
    ways = []
    for line, numbers in zip(lines, ids, strict=True):
        end = len(line) if common is None else numbers.index(common)
        ways.append([_step(s, row) for row in line[:end]])
    return Ancestry(common, (ways[0], ways[1]))


def _step(s: Session, row: DrafterVersion) -> VersionStep:
    return VersionStep(row.id, row.parent_id, row.created_at, _origin(s, row), row.note,
                       row.pruned_at is not None)  # fmt: skip


_TRIGGERS = {"manual": "by hand on the command line", "dashboard": "by hand on the page Training"}


def _origin(s: Session, row: DrafterVersion) -> str:
    run = s.get(TrainingRun, row.training_run_id) if row.training_run_id else None
    if run is None:
        words = {"scratch": "made untrained", "import": "imported", "train": "trained elsewhere"}
        return words.get(row.source, row.source)
    who = _TRIGGERS.get(run.trigger, f"by the trigger {run.trigger}")
    if run.trigger == "dashboard":
        asked = queries.audit.last_before(s, run.group_id, "train", run.started_at)
        if asked is not None and run.started_at - asked.created_at <= _STARTS_WITHIN:
            who += f" ({asked.actor})"
    return f"trained in run {run.id}, started {who}"


def _run(s: Session, version: DrafterVersion) -> RunFacts | None:
    run = s.get(TrainingRun, version.training_run_id) if version.training_run_id else None
    if run is None:
        return None
    return RunFacts(
        run.id, run.trigger, run.objective, run.base_version_id, run.window_start, run.window_end,
        run.requests, run.tokens, queries.training_requests.domains_of(s, run.id),
    )  # fmt: skip


def _differing(s: Session, first: DrafterVersion, second: DrafterVersion) -> list[DifferingValue]:
    runs = [s.get(TrainingRun, row.training_run_id) if row.training_run_id else None
            for row in (first, second)]  # fmt: skip
    parts = {
        "recipe": [flat(run.config) if run else {} for run in runs],
        "metric": [_numbers(run.metrics) if run else {} for run in runs],
        "drafter": [_drafter(row) for row in (first, second)],
    }
    return [
        DifferingValue(kind, name, (a.get(name), b.get(name)))
        for kind, (a, b) in parts.items()
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]


def _drafter(row: DrafterVersion) -> dict[str, Any]:
    names = ("architecture", "draft_vocab_size", "vocab_sha256", "target_model", "target_revision")
    return {**flat(row.config), **{name: getattr(row, name) for name in names}}


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    rows: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            rows |= flat(value, f"{before}{name}.")
        else:
            rows[f"{before}{name}"] = value
    return rows


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in flat(metrics).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


# -- trials ---------------------------------------------------------------------------


def _trials(s: Session, one: int, other: int) -> list[TrialFacts]:
    rows = [*queries.trials.trials_of(s, one, other), *queries.trials.trials_of(s, other, one)]
    rows.sort(key=lambda row: -row.id)
    return [_trial(s, row, one) for row in rows[:MOST_TRIALS]]


def _trial(s: Session, trial: Trial, first: int) -> TrialFacts:
    rows = queries.evaluations.evaluations(s, trial.candidate_id)
    mine = [row for row in rows if row.kind == "trial" and row.details.get("trial_id") == trial.id]
    judged = mine[0] if mine else None
    ends = (judged.difference, judged.ci_low, judged.ci_high) if judged else (None, None, None)
    lengths = (
        (judged.baseline_accept_length, judged.candidate_accept_length) if judged else (None, None)
    )
    level = dict(trial.details.get("settings") or {}).get("level")
    return TrialFacts(
        trial_id=trial.id,
        status=trial.status,
        started_at=trial.started_at,
        finished_at=trial.finished_at,
        verdict=trial.verdict,
        reason=str(trial.details.get("why") or trial.details.get("stopped_by") or ""),
        accept_length=lengths[::-1] if trial.candidate_id == first else lengths,
        **turned(*ends, trial.candidate_id == first),
        level=None if level is None else float(level),
        turns=[
            TrialTurn(
                row.number, row.version_id, row.started_at, row.requests, row.verify_steps,
                row.metrics.get("accept_length"), row.metrics.get("stream_tokens_per_second"),
            )
            for row in queries.trials.trial_windows(s, trial.id)
        ],
    )  # fmt: skip
