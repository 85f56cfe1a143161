"""Which requests a training run learnt from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from aurora_sgl.errors import AuroraError
from aurora_sgl.store.erased import erased_ids
from aurora_sgl.store.models import Request, Server, TrainingRequest, TrainingRun
from aurora_sgl.store.queries.requests import RecentRequest
from aurora_sgl.store.upsert import insert_missing

#: Runs whose requests are looked up: two days of hourly ones.
REMEMBERED_RUNS = 50


def add_training_requests(s: Session, run_id: int, request_ids: Iterable[int]) -> None:
    """Note them; twice is once."""
    rows = [{"run_id": run_id, "request_id": one} for one in sorted(set(request_ids))]
    insert_missing(s.connection(), TrainingRequest, rows, ["run_id", "request_id"])


def learnt_by(s: Session, run_id: int) -> list[int]:
    """What a run learnt from, by id."""
    query = select(TrainingRequest.request_id).where(TrainingRequest.run_id == run_id)
    return list(s.scalars(query.order_by(TrainingRequest.request_id)))


def domains_of(s: Session, run_id: int) -> dict[str, int]:
    """How many requests of each domain a run learnt from; the most first. Of those that are still
    stored."""
    count = func.count()
    query = (
        select(Request.domain, count)
        .join(TrainingRequest, TrainingRequest.request_id == Request.id)
        .where(TrainingRequest.run_id == run_id)
        .group_by(Request.domain)
        .order_by(count.desc(), Request.domain)
    )
    return dict(s.execute(query).tuples().all())


def may_train_counts(s: Session, group_id: int, newest: int) -> tuple[int, int]:
    """(those that may be learnt from, all) of the newest requests that have ended."""
    servers = select(Server.id).where(Server.group_id == group_id)
    query = (
        select(Request.may_train)
        .where(Request.server_id.in_(servers), Request.finished_at.is_not(None))
        .order_by(Request.finished_at.desc())
        .limit(newest)
    )
    answers = s.scalars(query).all()
    return sum(map(bool, answers)), len(answers)


def never_learnt(s: Session, group_id: int, rows: Sequence[RecentRequest]) -> list[RecentRequest]:
    """Those of these requests that finished after all that the group's newest ``REMEMBERED_RUNS``
    runs learnt from, of conversations that none of them learnt from; in their order.

    Looked up from the runs, by primary keys: stores hold many more requests than these runs read.
    """
    newest_runs = (
        select(TrainingRun.id)
        .where(TrainingRun.group_id == group_id)
        .order_by(TrainingRun.id.desc())
        .limit(REMEMBERED_RUNS)
    )
    runs = s.scalars(newest_runs).all()
    learnt = (
        select(Request.conversation_hash, func.max(Request.finished_at))
        .join(TrainingRequest, TrainingRequest.request_id == Request.id)
        .where(TrainingRequest.run_id.in_(runs))
        .group_by(Request.conversation_hash)
    )
    last = dict(s.execute(learnt).tuples().all())
    newest = max(filter(None, last.values()), default=None)
    return [
        row for row in rows
        if (newest is None or row.finished_at > newest)
        and (not row.conversation_hash or row.conversation_hash not in last)
    ]  # fmt: skip


def require_not_purged(s: Session, request_ids: Iterable[int]) -> None:
    """Raises ``AuroraError`` when some of these requests were purged meanwhile."""
    count = len(erased_ids(s.connection(), request_ids))
    if count:
        raise AuroraError(
            f"{count} of the requests that it learnt from were purged meanwhile; what it learnt "
            "is thrown away, the next run goes without them"
        )
