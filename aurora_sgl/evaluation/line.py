"""Candidate lines in the store: the tries against one live version since it went live.

Each try's evaluation keeps what the line came to with it, so that the next one, and whoever wants
to repeat the judgement, needs only those rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from aurora_sgl.evaluation.gate import FAIL, CandidateLine
from aurora_sgl.evaluation.pooling import Memory
from aurora_sgl.evaluation.standing import Standing, standing_of
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation


def tries(s: Session, baseline_id: int) -> tuple[int, Sequence[Evaluation]]:
    """Which line goes on against a version, and its evaluations, oldest first. A line is named by
    the generation in which the version last went live (0: it never did): what was tried before a
    rollback to it, or before this rule, is of another."""
    version = queries.versions.version(s, baseline_id)
    last = queries.deployments.last_to(s, version.group_id, baseline_id)
    generation = last.generation if last else 0
    rows = queries.evaluations.replays_against(s, baseline_id)
    return generation, [
        row for row in rows if (row.details.get("line") or {}).get("generation") == generation
    ]


def line_of(rows: Sequence[Evaluation]) -> CandidateLine:
    """From :func:`tries`."""
    requests: set[int] = set()
    conversations: set[str] = set()
    judged = [row for row in rows if row.attempt is not None]
    for row in judged:
        for request in row.details.get("requests") or ():
            requests.add(request[0])
            conversations.update(request[7:8])
    last = judged[-1].details["line"] if judged else {}
    memories = {name: Memory(*kept) for name, kept in (last.get("strata") or {}).items()}
    log_e = float(last.get("log_e", 0.0))
    return CandidateLine(len(judged), log_e, requests, conversations - {""}, memories)


def standing_before(s: Session, baseline_id: int) -> Standing:
    """Where a version stands below its high-water marks: as the evaluation by which it went live
    has it. Without one, and for a promotion of a version judged against another, it starts anew."""
    version = queries.versions.version(s, baseline_id)
    promotion = queries.deployments.promotion_of(s, version.group_id, baseline_id)
    if promotion is None or promotion.evaluation_id is None:
        return {}
    row = queries.evaluations.evaluation(s, promotion.evaluation_id)
    if row.candidate_id != baseline_id or row.baseline_id != promotion.previous_version_id:
        return {}
    return standing_of(row.details.get("standing"))


def to_continue(s: Session, live_id: int) -> tuple[int, str]:
    """What the next run starts from, and why it is not the newest candidate of the line (empty: it
    is, or there is none): the newest that did not fail and lies at most one standard error below
    the live version, else the live version."""
    judged = set()
    for row in reversed(tries(s, live_id)[1]):
        if row.attempt is None or row.candidate_id in judged:
            continue  # it said nothing, or the candidate was judged again since
        judged.add(row.candidate_id)
        if row.verdict == FAIL or not row.details["line"].get("continues"):
            continue
        candidate = queries.versions.version(s, row.candidate_id)
        if candidate.pruned_at is not None:
            return live_id, (
                f"version {candidate.id}, from which training would have gone on, has no weights "
                f"any more; it starts from the live version {live_id}"
            )
        return candidate.id, ""
    return live_id, ""
