"""Once a day somebody does a round of retention over a group: the scheduler that leads it, or where
there is none a sidecar. A lease in the store decides which, and the store's clock when."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries
from aurora_sgl.store.connection import session
from aurora_sgl.store.faults import in_words, is_away
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.liveness import (
    PRUNE_LEASE_SECONDS,
    name_of_this_process,
    prune_lease_name,
    scheduler_lease_name,
)
from aurora_sgl.store.models import PruneRun
from aurora_sgl.store.orphans import SweptFiles, sweep_traces
from aurora_sgl.store.pruning.pace import Interrupted, PrunePace
from aurora_sgl.store.pruning.weights import Files
from aurora_sgl.store.retention import PruneReport, prune
from aurora_sgl.store.store_clock import store_now

#: Seconds between two looks whether a round is due.
LOOK_SECONDS = 30.0

log = logging.getLogger(__name__)


class Root(Files, SweptFiles, Protocol):
    """What retention needs of ``artifacts.ArtifactRoot``."""

    def sweep(self) -> int: ...


class Housekeeper:
    """Prunes a group when it is due, in a thread of its own. One thread calls it."""

    def __init__(
        self, link: StoreLink, files: Root, actor: str, *, stands_in: bool = False
    ) -> None:
        """``actor``: what part of the system this is, for people. ``stands_in``: only where no
        scheduler leads the group."""
        self._link, self._files = link, files
        self._actor, self._stands_in = actor, stands_in
        self._holder = name_of_this_process()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._looked = float("-inf")

    def look(self, group_id: int) -> None:
        """Begin a round when one is due; returns at once. Raises ``StoreAway``."""
        if time.monotonic() - self._looked < LOOK_SECONDS or self.busy:
            return
        self._looked = time.monotonic()
        with self._link.session(write=False) as s:
            if not self._is_due(s, group_id):
                return
        self._thread = threading.Thread(
            target=self._round, args=(group_id,), name="retention", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(self, seconds: float = 2.0) -> None:
        """A round that goes on ends soon; the next one does the rest."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _is_due(self, s: Session, group_id: int) -> bool:
        due, now = queries.prune_runs.due_at(s, group_id), store_now(s)
        if due is None or now < due or self._stop.is_set():
            return False
        leader = queries.leases.lease(s, scheduler_lease_name(group_id))
        return not self._stands_in or leader is None or leader.expires_at <= now

    def _round(self, group_id: int) -> None:
        try:
            with self._link.guard() as engine:
                self.round(engine, group_id)
        except StoreAway:
            pass  # said in the log by the link; an hour later it is tried again
        except Exception:
            log.exception("a round of retention failed")

    def round(self, engine: Engine, group_id: int) -> PruneReport | None:
        """A round, if it is still due and nobody else is at it. Raises what the database raises."""
        name = prune_lease_name(group_id)
        with session(engine) as s:
            token = queries.leases.acquire_lease(
                s, name, self._holder, PRUNE_LEASE_SECONDS, store_now(s)
            )
            if token is None:
                return None
            if not self._is_due(s, group_id):  # somebody else was quicker
                queries.leases.release_lease(s, name, self._holder, token)
                return None
            actor = f"{self._actor} {self._holder.rpartition(':')[0]}"
            run = queries.prune_runs.start(s, group_id, actor)
        try:
            return self._carry_out(engine, run, token)
        finally:
            with session(engine) as s:
                queries.leases.release_lease(s, name, self._holder, token)

    def _carry_out(self, engine: Engine, run: PruneRun, token: int) -> PruneReport | None:
        lease = _Renewal(engine, prune_lease_name(run.group_id), self._holder, token)
        error, report = "", None
        try:
            report = prune(
                engine, self._files, run.group_id, pace=PrunePace(lease.holds, stop=self._stop)
            )
            if report.emptied:
                error = f"in use, their tables go another time: {', '.join(report.emptied)}"
            log.info("retention of group %d: %s deleted", run.group_id, report.sentence)
            if report.not_ours:
                log.warning(
                    "%d tables of old days are empty and not this role's to drop; their owner "
                    "drops them with `aurora-sgl db upgrade`", len(report.not_ours)
                )  # fmt: skip
            self._files.sweep()
            sweep_traces(engine, self._files)
        except Interrupted:
            error = "it was interrupted"
        except (AuroraError, OSError) as failure:
            error = str(failure)
        except Exception as failure:
            if not is_away(failure):
                raise
            error = in_words(failure)
        if error:
            log.warning("retention of group %d: %s; trying again in an hour", run.group_id, error)
        with session(engine) as s:
            queries.prune_runs.finish(s, run.id, report.as_json() if report else {}, error)
        return report


class _Renewal:
    """Keeps a lease while a round goes on."""

    def __init__(self, engine: Engine, name: str, holder: str, token: int) -> None:
        self._engine, self._name, self._holder, self._token = engine, name, holder, token
        self._renewed = time.monotonic()

    def holds(self) -> bool:
        """Renewed when a quarter of it is over. False: somebody else has it."""
        if time.monotonic() - self._renewed < PRUNE_LEASE_SECONDS / 4:
            return True
        self._renewed = time.monotonic()
        with session(self._engine) as s:
            return queries.leases.renew_lease(
                s, self._name, self._holder, self._token, PRUNE_LEASE_SECONDS, store_now(s)
            )
