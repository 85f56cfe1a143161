"""A candidate that is waiting for evidence, judged again by what was served since.

Nothing that was served after its run read its data was learnt from, by it or by what it descends
from: until the next run learns from it, it judges the candidate as held-out requests do, and there
is six times as much of it as of them (each conversation first tests and then trains: Dawid 1984,
"The prequential approach"). So the run that would go on from a candidate looks at it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from aurora_sgl import store
from aurora_sgl.evaluation.gate import FAIL, PASS, CandidateLine
from aurora_sgl.evaluation.line import line_of, tries
from aurora_sgl.evaluation.record import key_of_conversation
from aurora_sgl.sequences.dataset import SequenceSet
from aurora_sgl.sequences.held_out import held_out_of
from aurora_sgl.sequences.splits import conversation_of
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation
from aurora_sgl.training.bases import BaseIds, Bases
from aurora_sgl.training.run_data import RunData
from aurora_sgl.training.settings import TrainSettings


@dataclass(frozen=True)
class RequestsSince:
    """What judges a candidate again, and how many requests can't, by reason."""

    judging: SequenceSet
    left_out: Mapping[str, int]


def requests_since(sources: RunData, ids: BaseIds, settings: TrainSettings) -> RequestsSince | None:
    """What was served since the base was trained. ``None``: the base is the live version, it has
    passed already and waits for a person, or fewer than ``min_gate_requests`` conversations came
    that no try of its line was made on."""
    if ids.base == ids.baseline:
        return None
    with store.session(sources.engine, write=False) as s:
        line = tries(s, ids.baseline)[1]
        verdicts = [row.verdict for row in line if row.candidate_id == ids.base]
        if verdicts[-1:] == [PASS]:
            return None
        of_base = queries.versions.version(s, ids.base).training_run_id
        learnt = queries.training_requests.learnt_by(s, of_base) if of_base else []
    data, newest = sources.newest_unlearnt(learnt)
    rows = [row for row, _ in data.gate.items]
    conversations = {row.request_id: conversation_of(row) for row in rows}
    if _fresh(line_of(line), conversations) < max(2, settings.min_gate_requests):
        return None
    left_out = held_out_of(rows, newest.not_judged + data.held_out_left).left_out
    return RequestsSince(data.gate, left_out)


def base_after(bases: Bases, judged: Evaluation) -> Bases:
    """What training starts from after that: the live version where the candidate failed or lies
    below it."""
    continues = judged.verdict != FAIL and judged.details["line"]["continues"]
    if continues or judged.attempt is None:
        return bases
    ids = bases.ids
    left = (
        f"training starts from the live version {ids.baseline}: version {ids.base}, judged again, "
        f"is not worth going on from ({judged.details['reason']})"
    )
    ids = BaseIds(ids.baseline, ids.baseline, left)
    return replace(bases, ids=ids, base=bases.baseline, base_sha256=bases.baseline_sha256)


def _fresh(line: CandidateLine, conversations: Mapping[int, str]) -> int:
    """Of these requests with their conversations, how many conversations no try of the line was
    made on."""
    return len(
        {
            name
            for request_id, name in conversations.items()
            if request_id not in line.requests
            and key_of_conversation(name) not in line.conversations
        }
    )
