"""Which requests a training run learnt from."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.orm import Session

from aurora_sgl.errors import AuroraError
from aurora_sgl.store.erased import erased_ids
from aurora_sgl.store.models import TrainingRequest
from aurora_sgl.store.upsert import insert_missing


def add_training_requests(s: Session, run_id: int, request_ids: Iterable[int]) -> None:
    """Note them; twice is once."""
    rows = [{"run_id": run_id, "request_id": one} for one in sorted(set(request_ids))]
    insert_missing(s.connection(), TrainingRequest, rows, ["run_id", "request_id"])


def require_not_purged(s: Session, request_ids: Iterable[int]) -> None:
    """Raises ``AuroraError`` when some of these requests were purged meanwhile."""
    count = len(erased_ids(s.connection(), request_ids))
    if count:
        raise AuroraError(
            f"{count} of the requests that it learnt from were purged meanwhile; what it learnt "
            "is thrown away, the next run goes without them"
        )
