"""How far a drafter may still be changed, by how much it was trained already.

A rate that teaches an untrained drafter quickly undoes a well-trained one. The peak is
``learning_rate`` up to ``YOUNG_TOKENS`` trained tokens, then falls as a power of them and is
``mature_learning_rate`` from ``MATURE_TOKENS`` on. Up to ``YOUNG_TOKENS`` a run makes
``young_updates`` at least; for a mature base more of what it trains on is older traffic
(``mature_replay_share``). A drafter that came from elsewhere counts as mature: what it was trained
on is not known, and nobody brings an untrained one.
"""

from __future__ import annotations

import math

from sqlalchemy.orm import Session

from aurora_sgl.store import queries
from aurora_sgl.training.settings import TrainSettings

YOUNG_TOKENS, MATURE_TOKENS = 1e5, 1e6


def trained_tokens(s: Session, version_id: int) -> float:
    """Positions that the runs along a version's lineage trained on; ``inf`` where the lineage
    begins with an import."""
    lineage = queries.versions.lineage(s, version_id)
    if lineage[-1].source == "import":
        return math.inf
    runs = [version.training_run_id for version in lineage if version.training_run_id is not None]
    return float(queries.runs.tokens_of_runs(s, runs))


def by_maturity(settings: TrainSettings, trained: float) -> TrainSettings:
    """The recipe for a base that was trained on so many tokens."""
    change: dict[str, float] = {"learning_rate": peak_rate(settings, trained)}
    least, most = settings.replay_share, settings.mature_replay_share
    if 0 < least < most:
        change["replay_share"] = least + maturity(trained) * (most - least)
    if trained <= YOUNG_TOKENS:
        change["least_updates"] = max(settings.least_updates, settings.young_updates)
    return settings.model_copy(update=change)


def maturity(trained: float) -> float:
    """0 up to ``YOUNG_TOKENS`` trained tokens, 1 from ``MATURE_TOKENS`` on, in between by their
    logarithm."""
    bounded = min(max(trained, YOUNG_TOKENS), MATURE_TOKENS)
    return math.log(bounded / YOUNG_TOKENS) / math.log(MATURE_TOKENS / YOUNG_TOKENS)


def peak_rate(settings: TrainSettings, trained: float) -> float:
    """Peak rate of a run whose base was trained on so many tokens."""
    young, mature = settings.learning_rate, settings.mature_learning_rate
    if mature >= young:
        return young
    age = maturity(trained)
    return mature if age == 1 else float(young * (mature / young) ** age)
