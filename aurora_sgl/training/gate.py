"""Base against candidate, by exact replay on requests that no run has trained on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead, read_target
from aurora_sgl.rollout.gate import Judgement, judge
from aurora_sgl.rollout.interval import Difference
from aurora_sgl.store.models import DeploymentGroup
from aurora_sgl.training.devices import device_of, served_dtype
from aurora_sgl.training.offline import load_version, replayable
from aurora_sgl.training.replay import Replayed, replay_one
from aurora_sgl.training.sequence import Sequence
from aurora_sgl.training.settings import TrainSettings


@dataclass(frozen=True)
class GateResult:
    """Both replays of the same requests, and what they come to as a first try.

    ``rollout.gate.record`` stores them; how often the live version was tried before counts there.
    """

    before: list[Replayed]
    after: list[Replayed]
    judged: Judgement

    @property
    def paired(self) -> Difference:
        return self.judged.overall

    @property
    def verdict(self) -> str:
        return self.judged.verdict


def evaluate(
    base: Drafter,
    candidate: Drafter,
    sequences: Iterable[Sequence],
    head: TargetHead,
    settings: TrainSettings,
) -> GateResult:
    """Replay both drafters in the served dtype and draft shape on these."""
    before, after = _replay_both(base, candidate, sequences, head, settings)
    judged = judge(before, after, fewest=settings.min_gate_requests, seed=settings.seed)
    return GateResult(before, after, judged)


def replay_pair(
    engine: Engine,
    artifacts: ArtifactRoot,
    group: DeploymentGroup,
    baseline_id: int,
    candidate_id: int,
    settings: TrainSettings,
    *,
    limit: int,
    target: Path | None = None,
) -> tuple[list[Replayed], list[Replayed]]:
    """Two stored versions over the newest held-out requests of their group.

    Raises ``AuroraError`` when weights are missing or damaged, or there are no such requests.
    """
    folder = Path(target or group.target_model)
    info = read_target(folder)
    old, new = (load_version(engine, artifacts, i, info) for i in (baseline_id, candidate_id))
    sequences = replayable(engine, artifacts, group, old, settings, limit, None)
    return _replay_both(old, new, sequences.readable(), TargetHead.load(folder), settings)


def _replay_both(
    base: Drafter,
    candidate: Drafter,
    sequences: Iterable[Sequence],
    head: TargetHead,
    settings: TrainSettings,
) -> tuple[list[Replayed], list[Replayed]]:
    dtype = served_dtype(settings)
    old, new = (copy.deepcopy(d).to(device_of(settings), dtype).eval() for d in (base, candidate))
    head = head.to(device_of(settings))
    before: list[Replayed] = []
    after: list[Replayed] = []
    for sequence in sequences:
        before.append(replay_one(old, sequence, settings.shape, head))
        after.append(replay_one(new, sequence, settings.shape, head))
    return before, after
