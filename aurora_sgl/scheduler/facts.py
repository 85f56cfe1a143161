"""What the scheduler reads of its group, in short transactions that only read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from aurora_sgl.rollout.switches import AUTO_PROMOTE, LEARNING
from aurora_sgl.scheduler.elapsed import Elapsed
from aurora_sgl.scheduler.policy import Facts
from aurora_sgl.store import queries
from aurora_sgl.store.models import Server

#: Deployments that are looked at for the last rollback.
_DEPLOYMENTS = 20


@dataclass(frozen=True)
class Pulse:
    """What may change from one second to the next and is obeyed at once."""

    learning: bool
    auto_promote: bool
    live_id: int | None
    live_since: datetime | None
    servers: Sequence[Server]
    watched: int | None  # version of the running watch
    trial_id: int | None
    staged: int | None  # version of the open stage


def pulse(s: Session, group_id: int) -> Pulse:
    last = queries.deployments.deployments(s, group_id, limit=1)
    watch, trial, stage = (
        queries.watches.running_watch(s, group_id),
        queries.trials.running_trial(s, group_id),
        queries.stages.open_stage(s, group_id),
    )
    return Pulse(
        learning=queries.switches.is_on(s, group_id, LEARNING),
        auto_promote=queries.switches.is_on(s, group_id, AUTO_PROMOTE),
        live_id=queries.aliases.aliases(s, group_id).get("live"),
        live_since=last[0].created_at if last else None,
        servers=queries.servers.servers(s, group_id),
        watched=watch.version_id if watch else None,
        trial_id=trial.id if trial else None,
        staged=stage.version_id if stage else None,
    )


def facts(s: Session, group_id: int, now: Pulse, elapsed: Elapsed) -> Facts:
    """What the triggers depend on."""
    last = queries.runs.runs(s, group_id, limit=1)
    success = queries.runs.runs(s, group_id, status="succeeded", limit=1)
    begun = success[0].started_at if success else queries.groups.group(s, group_id).created_at
    since = elapsed.on_this_clock(begun) if success else None
    ended = last[0].finished_at if last else None
    rollbacks = (
        row.created_at
        for row in queries.deployments.deployments(s, group_id, limit=_DEPLOYMENTS)
        if row.action == "rollback"
    )
    rolled_back = next(rollbacks, None)
    return Facts(
        learning=now.learning,
        live_id=now.live_id,
        new_requests=queries.requests.count_trainable(s, group_id, since=since),
        since_run=elapsed.since(ended) if ended is not None else None,
        since_success=elapsed.since(begun),
        since_rollback=elapsed.since(rolled_back) if rolled_back is not None else None,
        drift=_drift(s, group_id, now.live_id, since),
    )


def _drift(s: Session, group_id: int, live_id: int | None, since: datetime | None) -> str:
    falls = [d for d in queries.drifts.drifts(s, group_id, since=since) if d.version_id == live_id]
    changes = (
        f"{fall.domain}: {fall.accept_length_before:.2f} -> {fall.accept_length_after:.2f}"
        for fall in falls[:3]
    )
    return f"the accept length of version {live_id} fell ({'; '.join(changes)})" if falls else ""


def recipe_as_served(
    s: Session, group_id: int, recipe: dict[str, Any], *, explore: float = 0.0
) -> dict[str, Any]:
    """The recipe with the draft shape and dtype of the group's servers, and the share of runs that
    explore, where it names none."""
    served: dict[str, Any] = {"explore": explore}
    shape = queries.servers.served_shape(s, group_id)
    if shape is not None:
        served |= {"depth": shape[0], "topk": shape[1], "nodes": shape[2]}
    dtypes = [
        row.dtype for row in queries.servers.servers(s, group_id, states=("running", "stopped"))
    ]
    if dtypes and dtypes[0]:
        served["served_dtype"] = dtypes[0]
    return {**served, **recipe}
