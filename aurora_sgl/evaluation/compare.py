"""``aurora-sgl replay``: what versions would have had accepted on the requests in the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import get_settings
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead, TargetInfo, read_target
from aurora_sgl.errors import AuroraError
from aurora_sgl.evaluation.device import as_served
from aurora_sgl.evaluation.gate import difference_of, pairs_of
from aurora_sgl.evaluation.replay import RequestReplay, replay_one
from aurora_sgl.evaluation.settings import EvaluationSettings
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.sequences import dataset
from aurora_sgl.sequences.held_out import REACH, left_out_in_words
from aurora_sgl.sequences.splits import split_key, split_of, why_not_judged
from aurora_sgl.sequences.trace_cache import TraceFiles
from aurora_sgl.store import queries
from aurora_sgl.store.models import DeploymentGroup

_COMPARED = 1000  # newest requests to train on that held-out ones must not nearly repeat


@dataclass(frozen=True)
class ReplayLine:
    """One version on one domain under one accept rule (``""``: all of them). The difference is to
    the first version asked for, on the same requests, with its 95% interval; ``None`` for the
    first version itself."""

    version_id: int
    domain: str
    requests: int
    accept_length: float
    difference: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    accept_rule: str = ""


def replay_versions(
    engine: Engine,
    artifacts: ArtifactRoot,
    group: DeploymentGroup,
    version_ids: Sequence[int],
    settings: EvaluationSettings,
    *,
    limit: int,
    domains: Sequence[str] | None = None,
    only_held_out: bool = True,
    target: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ReplayLine]:
    """Replay versions over the newest ``limit`` requests that have a trace and can be judged.

    ``only_held_out``: only those that no training run has seen. ``progress`` gets (done, all).
    Raises ``AuroraError`` when there are no such requests, or weights are missing or damaged.
    """
    folder = Path(target or group.target_model)
    info = read_target(folder)
    head = TargetHead.load(folder)
    on_cpu = settings.model_copy(update={"device": "cpu"})  # a GPU belongs to the servers
    drafters = [
        as_served(load_version(engine, artifacts, each, info), on_cpu) for each in version_ids
    ]
    sequences = replayable(engine, artifacts, group, drafters[0], settings, limit, domains,
                           only_held_out)  # fmt: skip
    results: list[list[RequestReplay]] = [[] for _ in drafters]
    for done, sequence in enumerate(sequences.readable(), start=1):
        for drafter, replayed in zip(drafters, results, strict=True):
            replayed.append(replay_one(drafter, sequence, settings.shape, head))
        if progress is not None:
            progress(done, len(sequences))
    if not results[0]:
        raise AuroraError("none of the requests to replay could be read: their traces are broken")
    return [
        line
        for domain, rule in _strata(results[0])
        for line in _lines(domain, rule, version_ids, results, settings.seed)
    ]


def _strata(replayed: Sequence[RequestReplay]) -> list[tuple[str, str]]:
    """Domain and accept rule of the lines, ``""`` for all: domains, and where there are several
    rules these, and both together."""
    domains, rules = ({getattr(r, name) for r in replayed} for name in ("domain", "accept_rule"))
    strata = [("", ""), *((domain, "") for domain in sorted(domains))]
    if len(rules) > 1:
        strata += [("", rule) for rule in sorted(rules)]
        strata += sorted({(r.domain, r.accept_rule) for r in replayed}) if len(domains) > 1 else []
    return strata


def load_version(
    engine: Engine, artifacts: ArtifactRoot, version_id: int, target: TargetInfo
) -> Drafter:
    """A version in float32. Raises ``AuroraError`` when its weights are missing, damaged or made
    for another target."""
    from aurora_sgl.rollout.versions import fetch_verified

    with store.session(engine, write=False) as s:
        version = queries.versions.version(s, version_id)
    into = get_settings().home.resolve() / "cache" / "versions" / version.weights_sha256[:16]
    fetch_verified(artifacts, version, into)
    problems = checkpoint.validate(into, target)
    if problems:
        raise AuroraError(f"version {version_id} does not fit the target: {problems[0]}")
    return checkpoint.load(into, target_layers=target.num_layers).eval()


def replayable(
    engine: Engine,
    artifacts: ArtifactRoot,
    group: DeploymentGroup,
    drafter: Drafter,
    settings: EvaluationSettings,
    limit: int,
    domains: Sequence[str] | None,
    only_held_out: bool = True,
) -> dataset.SequenceSet:
    """The newest requests with a trace that can be judged. Held-out ones are of conversations that
    no run trains on, and do not nearly repeat a prompt that runs train on. Raises ``AuroraError``
    when there are none, with what was left out."""
    gate_share = settings.gate_share if only_held_out else 0.0

    def side(row: queries.requests.RecentRequest) -> str:
        return split_of(split_key(row), dev_share=0.0, gate_share=gate_share)

    with store.session(engine, write=False) as s:
        recent = queries.requests.recent_requests(s, group.id, limit=REACH)
        donors = [*recent, *queries.requests.donors(s, recent)]
        rows = queries.requests.recent_requests(s, group.id, domains=domains, limit=REACH)
    if only_held_out:
        rows = [row for row in rows if side(row) == "gate"]
    left_out = Counter(reason for row in rows if (reason := why_not_judged(row)))
    rows = [row for row in rows if not why_not_judged(row)]
    if only_held_out:
        rows += [row for row in recent if side(row) == "train"][:_COMPARED]
    else:
        rows = rows[:limit]
    files = TraceFiles(artifacts, get_settings().home / "cache")
    data = dataset.build(
        rows, files, drafter.config,
        dev_share=0.0, gate_share=gate_share, donors=donors, most_gate=limit,
    )  # fmt: skip
    sequences = data.gate if only_held_out else data.train
    if not sequences:
        left_out += data.held_out_left if only_held_out else data.left_out
        kind = "held-out request" if only_held_out else "request"
        raise AuroraError(
            f"group {group.name!r} has no {kind} with a trace that can be replayed yet"
            + left_out_in_words(left_out)
        )
    return sequences


def _lines(
    domain: str,
    rule: str,
    version_ids: Sequence[int],
    results: Sequence[Sequence[RequestReplay]],
    seed: int,
) -> list[ReplayLine]:
    mine = [
        [r for r in each if domain in ("", r.domain) and rule in ("", r.accept_rule)]
        for each in results
    ]
    first, length = version_ids[0], AcceptCounts.of(mine[0]).accept_length
    lines = [ReplayLine(first, domain, len(mine[0]), length, accept_rule=rule)]
    for number, replayed in zip(version_ids[1:], mine[1:], strict=True):
        pair = difference_of(pairs_of(mine[0], replayed), seed=seed)
        lines.append(
            ReplayLine(
                number,
                domain,
                pair.requests,
                pair.candidate,
                pair.difference,
                pair.ci_low,
                pair.ci_high,
                rule,
            )
        )
    return lines
