"""What rows that stay say of requests that were purged, and of a domain that was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode

from sqlalchemy import Connection, Engine, delete, select, update

from aurora_sgl.store.compact import overwrite_what_goes
from aurora_sgl.store.connection import session
from aurora_sgl.store.domains import forget_name
from aurora_sgl.store.erased import erased_ids
from aurora_sgl.store.models import (
    AlertRecord,
    Base,
    Delivery,
    Deployment,
    DrafterVersion,
    Drift,
    ErasedRequest,
    Evaluation,
    Notification,
    PruneRun,
    RolloutStage,
    SavedView,
    SchedulerState,
    Server,
    TrainingRun,
    Trial,
    TrialWindow,
    Watch,
    WatchWindow,
)

#: Text and JSON of rows that stay, in which a domain may be named.
NAMED_IN: tuple[tuple[type[Base], tuple[str, ...]], ...] = (
    (Evaluation, ("details",)),
    (TrainingRun, ("error", "config", "metrics", "progress")),
    (DrafterVersion, ("note", "metrics")),
    (Watch, ("reason", "baseline")),
    (WatchWindow, ("reason", "metrics")),
    (Trial, ("details",)),
    (TrialWindow, ("metrics",)),
    (SchedulerState, ("reason", "next_action", "details")),
    (PruneRun, ("report", "error")),
    (Server, ("phase_reason", "last_error", "counters", "notices")),
    (AlertRecord, ("text", "acknowledgement")),
    (Notification, ("title", "text", "details")),
    (Delivery, ("error",)),
    (RolloutStage, ("outcome", "windows")),
    (SavedView, ("name", "query")),
)
#: What stands where a name stood.
GONE = "(purged)"


def forget_requests(engine: Engine, erasure_id: int) -> int:
    """Take what evaluations and drifts say of single requests of a purge out of them; how many
    evaluations."""
    with session(engine) as s:
        connection = s.connection()
        overwrite_what_goes(connection)
        changed = 0
        for row in s.scalars(select(Evaluation).where(Evaluation.domain == "")):
            requests = row.details.get("requests")
            if isinstance(requests, list) and requests:
                kept = _without_purged(connection, requests)
                if len(kept) < len(requests):
                    row.details = {**row.details, "requests": kept}
                    changed += 1
        purged = select(ErasedRequest.request_id).where(ErasedRequest.erasure_id == erasure_id)
        connection.execute(
            update(Drift).where(Drift.last_request_id.in_(purged)).values(last_request_id=0)
        )
        return changed


def _without_purged(connection: Connection, requests: list[Any]) -> list[Any]:
    """Rows of ``details["requests"]`` begin with a request's number."""
    numbers = [row[0] for row in requests if isinstance(row, list) and row]
    purged = erased_ids(connection, (one for one in numbers if isinstance(one, int)))
    return [row for row in requests if not (isinstance(row, list) and row and row[0] in purged)]


def forget_domain(engine: Engine, domain: str) -> None:
    """Take a domain's name, and what was measured of it alone, out of every row that may change."""
    deployed = select(Deployment.evaluation_id).where(Deployment.evaluation_id.is_not(None))
    with session(engine) as s:
        overwrite_what_goes(s.connection())
        e = Evaluation
        s.execute(delete(e).where(e.domain == domain, e.id.not_in(deployed)))
        s.execute(delete(Drift).where(Drift.domain == domain))
        if domain:
            forget_name(s.connection(), domain)
        clean = cleaner(domain)
        for alert in s.scalars(select(AlertRecord)):
            if clean(alert.key) != alert.key:  # named so, it would be another alert
                s.delete(alert)
        s.flush()
        for model, columns in NAMED_IN:
            for row in s.scalars(select(model)):
                for column in columns:
                    value = getattr(row, column)
                    cleaned = clean(value)
                    if cleaned != value:
                        setattr(row, column, cleaned)
        for view in s.scalars(select(SavedView)):  # a name in an address is written otherwise
            pairs = parse_qsl(view.query, keep_blank_values=True)
            rest = [(key, clean(value)) for key, value in pairs]
            if rest != pairs:
                view.query = urlencode(rest)


def cleaner(domain: str) -> Callable[[Any], Any]:
    """Leaves out entries under the name (``code``, or ``3/1/4/greedy/code`` as the watch has it)
    and lists that hold it; in a text it becomes ``(purged)``."""
    word = re.compile(rf"(?<!\w){re.escape(domain)}(?!\w)")

    def is_named(key: str) -> bool:
        return key == domain or key.endswith(f"/{domain}")

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(one) for key, one in value.items() if not is_named(key)}
        if isinstance(value, list):
            rows = (one for one in value if not (isinstance(one, list) and domain in one))
            return [clean(one) for one in rows if one != domain]
        return word.sub(GONE, value) if isinstance(value, str) else value

    return clean
