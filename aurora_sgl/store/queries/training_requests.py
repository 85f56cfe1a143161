"""Which requests a training run learnt from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from aurora_sgl.errors import AuroraError
from aurora_sgl.store.erased import erased_ids
from aurora_sgl.store.models import Request, TrainingRequest, TrainingRun
from aurora_sgl.store.queries.requests import RecentRequest
from aurora_sgl.store.upsert import insert_missing


def add_training_requests(s: Session, run_id: int, request_ids: Iterable[int]) -> None:
    """Note them; twice is once."""
    rows = [{"run_id": run_id, "request_id": one} for one in sorted(set(request_ids))]
    insert_missing(s.connection(), TrainingRequest, rows, ["run_id", "request_id"])


def learnt_by(s: Session, run_id: int) -> list[int]:
    """What a run learnt from, by id."""
    query = select(TrainingRequest.request_id).where(TrainingRequest.run_id == run_id)
    return list(s.scalars(query.order_by(TrainingRequest.request_id)))


def never_learnt(s: Session, group_id: int, rows: Sequence[RecentRequest]) -> list[RecentRequest]:
    """Those of these requests that finished after all that the group's runs learnt from, of
    conversations that none learnt from; in their order."""
    of_group = (
        select(TrainingRequest.request_id)
        .join(TrainingRun, TrainingRun.id == TrainingRequest.run_id)
        .where(TrainingRun.group_id == group_id)
    )
    newest = s.scalar(select(func.max(Request.finished_at)).where(Request.id.in_(of_group)))
    rows = [row for row in rows if newest is None or row.finished_at > newest]
    begun: set[str] = set()
    names = sorted({row.conversation_hash for row in rows} - {""})
    for begin in range(0, len(names), 400):
        query = select(Request.conversation_hash).where(
            Request.conversation_hash.in_(names[begin : begin + 400]), Request.id.in_(of_group)
        )
        begun.update(s.scalars(query))
    return [row for row in rows if row.conversation_hash not in begun]


def require_not_purged(s: Session, request_ids: Iterable[int]) -> None:
    """Raises ``AuroraError`` when some of these requests were purged meanwhile."""
    count = len(erased_ids(s.connection(), request_ids))
    if count:
        raise AuroraError(
            f"{count} of the requests that it learnt from were purged meanwhile; what it learnt "
            "is thrown away, the next run goes without them"
        )
