"""A judgement of the gate in the store: one try, repeatable from what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.config import GateSettings
from aurora_sgl.evaluation.gate import LEVEL, Judgement, judge
from aurora_sgl.evaluation.line import line_of, standing_before, tries
from aurora_sgl.evaluation.replay import RequestReplay
from aurora_sgl.evaluation.settings import EvaluationSettings
from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.intervals import RESAMPLES, Difference, or_none
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation


def record(
    engine: Engine,
    before: Sequence[RequestReplay],
    after: Sequence[RequestReplay],
    *,
    candidate_id: int,
    baseline_id: int,
    recipe: EvaluationSettings,
    settings: GateSettings | None = None,
    details: Mapping[str, Any] | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Evaluation:
    """Judge a candidate and store it: one row over all domains, which is returned, and one for
    each domain. The same requests again are the same try: its row is returned as it is. The row
    keeps what repeats the judgement: the replays, the line before, where the live version stands.
    ``left_out``: held-out requests that can't be judged, by reason.

    The group is locked meanwhile, so that of two tries at once one is the next.
    """
    gate = settings or GateSettings()
    before, after = ([_shortened(each) for each in replays] for replays in (before, after))
    with store.session(engine) as s:
        candidate, baseline = (queries.versions.version(s, i) for i in (candidate_id, baseline_id))
        queries.groups.lock_group(s, candidate.group_id)
        evidence = _evidence(s, before, after, recipe, gate)
        for earlier in queries.evaluations.evaluations(s, candidate_id):
            if (
                earlier.baseline_id == baseline_id
                and not earlier.domain
                and earlier.details.get("replay_sha256") == evidence["replay_sha256"]
            ):
                return earlier
        generation, tried = tries(s, baseline_id)
        line = line_of(tried)
        judgement = judge(
            before,
            after,
            line=line,
            standing=(standing := standing_before(s, baseline_id)),
            fewest=recipe.min_gate_requests,
            seed=recipe.seed,
            settings=gate,
            left_out=left_out,
        )
        evidence |= {
            "candidate_sha256": candidate.weights_sha256,
            "baseline_sha256": baseline.weights_sha256,
            "judged": {"requests": judgement.overall.requests, "left_out": dict(left_out or {})},
            "standing_before": {name: each.as_json() for name, each in standing.items()},
            **_kept(judgement),
            **(details or {}),
        }
        evidence["line"] |= {"generation": generation, "log_e_before": line.log_e}
        row = _add(
            s,
            candidate_id,
            baseline_id,
            "",
            judgement.overall,
            judgement.verdict,
            recipe,
            attempt=judgement.attempt,
            details=_clean(evidence),
        )
        for domain, (difference, verdict) in judgement.by_domain.items():
            of = {"evaluation_id": row.id, "level": LEVEL}
            _add(s, candidate_id, baseline_id, domain, difference, verdict, recipe, details=of)
        return row


def _kept(judgement: Judgement) -> dict[str, Any]:
    """What the row says of a judgement beside its columns."""
    return {
        "reason": judgement.reason,
        "by_domain": {
            domain: {**asdict(difference), "verdict": verdict}
            for domain, (difference, verdict) in judgement.by_domain.items()
        },
        "by_stratum": {
            name: {
                **asdict(each.change),
                "believed": each.pooled.mean,
                "deviation": each.pooled.deviation,
                "risk": each.pooled.chance,
                "level": each.level,
            }
            for name, each in judgement.strata.items()
        },
        "line": {
            "log_e": judgement.log_e,
            "fresh": judgement.fresh,
            "continues": judgement.continues,
            "strata": {name: list(astuple(each)) for name, each in judgement.memories.items()},
        },
        "standing": {name: each.as_json() for name, each in judgement.standing.items()},
        "level": LEVEL,
    }


def _add(
    s: Session,
    candidate_id: int,
    baseline_id: int,
    domain: str,
    difference: Difference,
    verdict: str,
    recipe: EvaluationSettings,
    **columns: Any,
) -> Evaluation:
    return queries.evaluations.add_evaluation(
        s,
        candidate_id=candidate_id,
        baseline_id=baseline_id,
        kind="replay",
        domain=domain,
        requests=difference.requests,
        verdict=verdict,
        candidate_accept_length=or_none(difference.candidate),
        baseline_accept_length=or_none(difference.baseline),
        difference=or_none(difference.difference),
        ci_low=or_none(difference.ci_low),
        ci_high=or_none(difference.ci_high),
        depth=recipe.shape.depth,
        topk=recipe.shape.topk,
        nodes=recipe.shape.nodes,
        **columns,
    )


def _evidence(
    s: Session,
    before: Sequence[RequestReplay],
    after: Sequence[RequestReplay],
    recipe: EvaluationSettings,
    gate: GateSettings,
) -> dict[str, Any]:
    """What repeats the comparison: which requests, of which bytes, replayed how."""
    rows = [
        [a.request_id, a.domain, a.accepted, a.verify_steps, b.accepted, b.verify_steps,
         a.accept_rule, a.conversation]
        for a, b in zip(before, after, strict=True)
    ]  # fmt: skip
    traces = (queries.traces.trace(s, a.request_id) for a in before)
    replayed = {
        # id, domain, baseline's accepted and steps, candidate's, accept rule, conversation
        "requests": rows,
        "traces_sha256": sha256_bytes(
            ",".join(trace.sha256 if trace else "-" for trace in traces).encode()
        ),
        "shape": [recipe.shape.depth, recipe.shape.topk, recipe.shape.nodes],
        "served_dtype": recipe.served_dtype,
    }
    return {
        **replayed,
        "replay_sha256": sha256_bytes(json.dumps(replayed).encode()),
        "seed": recipe.seed,
        "resamples": RESAMPLES,
        "gate_share": recipe.gate_share,
        "fewest": recipe.min_gate_requests,
        "settings": gate.model_dump(mode="json"),
    }


def key_of_conversation(conversation: str) -> str:
    """What an evaluation keeps of a conversation's name: enough to tell some thousands apart."""
    return sha256_bytes(conversation.encode())[:16] if conversation else ""


def _shortened(replayed: RequestReplay) -> RequestReplay:
    return replace(replayed, conversation=key_of_conversation(replayed.conversation))


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    return or_none(value) if isinstance(value, float) else value
