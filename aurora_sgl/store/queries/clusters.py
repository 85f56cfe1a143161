"""The sums over requests in ``acceptance_minute``: which of them are right for which rows."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, func

from aurora_sgl.store.models import AcceptanceMinute
from aurora_sgl.store.rollup import CLUSTER_SUMS, CLUSTERS

#: For rows of one draft shape; of all draft shapes, mixed steps left out; mixed ones among them.
BY_SHAPE, BY_VERSION, WHOLE = CLUSTERS


def cluster_sums(clusters: str) -> list[ColumnElement[Any]]:
    """Requests, n^2, y^2 and n y, see ``AcceptanceMinute``."""
    return [func.sum(getattr(AcceptanceMinute, clusters + name)) for name in CLUSTER_SUMS]
