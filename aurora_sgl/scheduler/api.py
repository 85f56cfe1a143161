"""A read-only HTTP API for CI and chat tools: what is live, verdicts, alerts, deployments, runs.

Off without a token. Every answer is JSON; ``/openapi.json`` describes them. Nothing can be changed
here: promote and roll back by the command line or the page, which ask who does it and why.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from aurora_sgl import __version__
from aurora_sgl.config import SchedulerSettings
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout import status
from aurora_sgl.rollout.run_progress import RunProgress
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.models import TrainingRun

#: Letters below which a token is refused: it would be guessed.
LEAST_TOKEN = 16
#: Seconds that the API may take to begin listening.
START_SECONDS = 10.0
Answer = TypeVar("Answer")
View = TypeVar("View", bound=BaseModel)
Limit = Annotated[int, Query(ge=1, le=1000, description="How many, newest first.")]

log = logging.getLogger(__name__)


class ServerView(BaseModel):
    """One running server. ``reason``: why it does not run what it should."""

    name: str
    live_version_id: int | None
    live_sha256: str
    converged: bool
    reason: str
    phase: str
    last_seen_at: datetime
    silent: bool


class LiveView(BaseModel):
    """What should be live in a group, and what its servers run."""

    group: str
    generation: int
    version_id: int | None
    weights_sha256: str
    previous_version_id: int | None
    candidate_version_id: int | None
    converged: bool
    servers: list[ServerView]


class SchedulerView(BaseModel):
    """What the scheduler that leads does, what it will do next, and why."""

    alive: bool
    state: str
    reason: str
    next_action: str
    next_at: datetime | None
    learning: bool
    auto_promote: bool


class VerdictView(BaseModel):
    """One evaluation over all domains."""

    id: int
    kind: str
    verdict: str
    candidate_id: int
    baseline_id: int | None
    candidate_accept_length: float | None
    baseline_accept_length: float | None
    ci_low: float | None
    ci_high: float | None
    requests: int
    reason: str
    created_at: datetime


class DeploymentView(BaseModel):
    """One promotion or rollback."""

    generation: int
    action: str
    version_id: int
    previous_version_id: int | None
    actor: str
    reason: str
    created_at: datetime


class AlertView(BaseModel):
    """Something that is or was off."""

    id: int
    kind: str
    severity: str
    text: str
    began_at: datetime
    ended_at: datetime | None
    acknowledged_by: str
    acknowledged_at: datetime | None
    acknowledgement: str


class ProgressView(BaseModel):
    """How far a run is that goes on, by its last word. ``null``: not told yet."""

    stage: str
    done: int
    total: int
    seconds_left: float | None
    stage_seconds_left: float | None
    updated_at: datetime | None


class RunView(BaseModel):
    """One training run. ``progress``: of one that goes on, or broke off."""

    id: int
    trigger: str
    status: str
    started_at: datetime
    finished_at: datetime | None
    base_version_id: int | None
    requests: int
    tokens: int
    objective: str
    error: str
    progress: ProgressView | None


def make_app(link: StoreLink, group: str, token: str) -> FastAPI:
    """The application. Raises ``AuroraError`` for a token that would be guessed."""
    if len(token) < LEAST_TOKEN:
        raise AuroraError(
            f"AURORA_SCHEDULER_API_TOKEN has {len(token)} letters; it needs at least {LEAST_TOKEN}"
        )
    bearer = HTTPBearer(auto_error=False, description="AURORA_SCHEDULER_API_TOKEN")

    def authorized(
        given: HTTPAuthorizationCredentials | None = Depends(bearer),  # noqa: B008
    ) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(
                401,
                "send the header Authorization: Bearer with AURORA_SCHEDULER_API_TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )

    app = FastAPI(
        title="Aurora-SGL",
        version=__version__,
        description=__doc__,
        docs_url=None,
        redoc_url=None,
    )

    @app.exception_handler(StoreAway)
    async def store_away(_: Request, away: Exception) -> JSONResponse:
        return JSONResponse({"detail": f"the store is away: {away}"}, 503)

    @app.exception_handler(AuroraError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 404)

    _add_routes(app, _Reader(link, group), [Depends(authorized)])
    return app


class _Reader:
    """Reads of the store, each in a thread: a slow one must not hold up the others."""

    def __init__(self, link: StoreLink, group: str) -> None:
        self._link, self.group = link, group

    async def rows(self, read: Callable[[Session, int], Answer]) -> Answer:
        def work() -> Answer:
            with self._link.session(write=False) as s:
                return read(s, queries.groups.group_by_name(s, self.group).id)

        return await run_in_threadpool(work)

    async def views(
        self, view: type[View], read: Callable[[Session, int], Sequence[Any]]
    ) -> list[View]:
        """Rows as an answer shows them."""
        return await self.rows(
            lambda s, group_id: [
                view.model_validate(row, from_attributes=True) for row in read(s, group_id)
            ]
        )

    async def engine(self, read: Callable[[Engine, str], Answer]) -> Answer:
        def work() -> Answer:
            with self._link.guard() as engine:
                return read(engine, self.group)

        return await run_in_threadpool(work)


def _add_routes(app: FastAPI, reader: _Reader, locks: list[Any]) -> None:
    @app.get("/api/v1/live", dependencies=locks, summary="What is live, and where")
    async def live() -> LiveView:
        return await reader.engine(_live)

    @app.get("/api/v1/scheduler", dependencies=locks, summary="What the scheduler does, and why")
    async def scheduler() -> SchedulerView:
        return await reader.engine(_scheduler)

    @app.get("/api/v1/verdicts", dependencies=locks, summary="Verdicts of gate and trials")
    async def verdicts(limit: Limit = 20) -> list[VerdictView]:
        return await reader.rows(
            lambda s, group_id: [
                _verdict(row) for row in queries.evaluations.verdicts(s, group_id, limit=limit)
            ]
        )

    @app.get("/api/v1/deployments", dependencies=locks, summary="Promotions and rollbacks")
    async def deployments(limit: Limit = 20) -> list[DeploymentView]:
        return await reader.views(
            DeploymentView,
            lambda s, group_id: queries.deployments.deployments(s, group_id, limit=limit),
        )

    @app.get("/api/v1/alerts", dependencies=locks, summary="What is off, or was")
    async def list_alerts(history: bool = False, limit: Limit = 100) -> list[AlertView]:
        return await reader.views(
            AlertView,
            lambda s, group_id: (
                queries.alerts.alerts(s, group_id, limit=limit)
                if history
                else queries.alerts.open_alerts(s, group_id)[-limit:][::-1]
            ),
        )

    @app.get("/api/v1/runs", dependencies=locks, summary="Training runs")
    async def runs(limit: Limit = 20) -> list[RunView]:
        return await reader.rows(
            lambda s, group_id: [_run(row) for row in queries.runs.runs(s, group_id, limit=limit)]
        )


def _live(engine: Engine, group: str) -> LiveView:
    look = status.look(engine, group)
    servers = [ServerView.model_validate(one, from_attributes=True) for one in look.servers]
    version_id = look.aliases.get("live")
    return LiveView(
        group=group,
        generation=look.generation,
        version_id=version_id,
        weights_sha256=status.weights_sha256(engine, version_id),
        previous_version_id=look.aliases.get("previous"),
        candidate_version_id=look.aliases.get("candidate"),
        converged=all(one.converged for one in look.servers),
        servers=servers,
    )


def _scheduler(engine: Engine, group: str) -> SchedulerView:
    look = status.look(engine, group)
    on = {switch.name: switch.on for switch in look.switches}
    return SchedulerView(
        alive=look.scheduler.alive,
        state=look.scheduler.state,
        reason=look.scheduler.reason,
        next_action=look.scheduler.next_action,
        next_at=look.scheduler.next_at,
        learning=on["learning"],
        auto_promote=on["auto_promote"],
    )


def _verdict(row: Any) -> VerdictView:
    columns = {name: getattr(row, name) for name in VerdictView.model_fields if name != "reason"}
    return VerdictView(**columns, reason=str(row.details.get("reason", "")))


def _run(row: TrainingRun) -> RunView:
    columns = {name: getattr(row, name) for name in RunView.model_fields if name != "progress"}
    progress = RunProgress.of(row) if row.progress else None
    view = ProgressView.model_validate(progress, from_attributes=True) if progress else None
    return RunView(**columns, progress=view)


class ApiServer:
    """The API on a port of its own, in a thread."""

    def __init__(self, link: StoreLink, group: str, rules: SchedulerSettings) -> None:
        """Raises ``AuroraError`` for a token that would be guessed, and a port that is taken."""
        app = make_app(link, group, rules.api_token.get_secret_value())
        config = uvicorn.Config(
            app,
            host=rules.host,
            port=rules.api_port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=5,
            limit_concurrency=64,
        )
        self._server = uvicorn.Server(config)
        try:
            sockets = [config.bind_socket()]
        except SystemExit:
            raise AuroraError(
                f"the API can't listen on {rules.host}, port {rules.api_port}; choose another with "
                "AURORA_SCHEDULER_API_PORT"
            ) from None
        host, port = sockets[0].getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._thread = threading.Thread(
            target=self._server.run, args=(sockets,), name="api", daemon=True
        )

    def start(self) -> None:
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        log.info("read-only API at %s", self.url)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(5.0)
