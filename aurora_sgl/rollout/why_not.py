"""Why a version is not live, in a word and in a sentence: the same on pages and in commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from aurora_sgl.store import queries
from aurora_sgl.store.models import DrafterVersion, Evaluation, TrainingRun

#: Words for verdicts of the gate that are no pass.
_WORDS = {"inconclusive": "not judged", "fail": "failed"}


@dataclass(frozen=True)
class NotLive:
    """``was_live``: it was once, and something else went live after it."""

    version_id: int
    word: str  # was live, not judged, failed, passed, no gate, run failed, being judged, imported
    reason: str
    was_live: bool = False

    @property
    def sentence(self) -> str:
        return f"version {self.version_id}: {self.word}: {self.reason}"


def not_live(s: Session, group_id: int) -> dict[int, NotLive]:
    """Of each version of the group that is not live, by its id."""
    live = queries.aliases.aliases(s, group_id).get("live")
    versions = [row for row in queries.versions.versions(s, group_id) if row.id != live]
    newest = queries.evaluations.newest_evaluations(s, [row.id for row in versions])
    deployed = {row.version_id for row in queries.deployments.deployments(s, group_id)}
    runs = {row.id: row for row in queries.runs.runs(s, group_id)}
    reasons = {}
    for version in versions:
        if version.id in deployed:
            reason = f"version {live} went live after it" if live else "nothing is live"
            reasons[version.id] = NotLive(version.id, "was live", reason, was_live=True)
        else:
            run = runs.get(version.training_run_id or 0)
            reasons[version.id] = _of_candidate(version, newest.get(version.id), run, live)
    return reasons


def newest_candidate(reasons: Sequence[NotLive]) -> NotLive | None:
    """The newest version that was never live."""
    return max(
        (one for one in reasons if not one.was_live), key=lambda one: one.version_id, default=None
    )


def _of_candidate(
    version: DrafterVersion,
    evaluation: Evaluation | None,
    run: TrainingRun | None,
    live: int | None,
) -> NotLive:
    if evaluation is None:
        return NotLive(version.id, *_without_evaluation(version, run))
    if evaluation.verdict in _WORDS:
        reason = str(evaluation.details.get("reason") or "no reason was kept")
        return NotLive(version.id, _WORDS[evaluation.verdict], reason)
    if evaluation.baseline_id not in (None, live):
        reason = f"it passed against version {evaluation.baseline_id}, which is not live any more"
    else:
        reason = "it passed the gate, and nobody has promoted it yet"
    return NotLive(version.id, "passed", reason)


def _without_evaluation(version: DrafterVersion, run: TrainingRun | None) -> tuple[str, str]:
    if run is None:
        return "imported", "it comes from outside, and nobody has promoted it"
    if run.status == "running":
        return "being judged", f"its run {run.id} goes on"
    if run.status == "failed":
        return "run failed", f"its run {run.id} failed before it was judged: {run.error}"
    return "no gate", f"its run {run.id} ended, and no gate has looked at it"
