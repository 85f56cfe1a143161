"""What a sidecar tidies of its own machine, at its start and once an hour: what killed processes
left half written, files of traces that no row names, refused records of long ago."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from aurora_sgl import litter
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.refused import RefusedFile
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.orphans import sweep_traces
from aurora_sgl.store.store_clock import store_now

#: Seconds from the start to the first look at the store, and from then on between two rounds.
FIRST_SECONDS, EVERY_SECONDS = 60.0, 3600.0

log = logging.getLogger(__name__)


class Chores:
    """Runs in a thread of its own, for which nobody waits at the end."""

    def __init__(
        self,
        link: StoreLink,
        artifacts: ArtifactRoot,
        scratch: Path,
        refused: RefusedFile,
        *,
        stored_boots: Callable[[], Collection[int]],
        group_id: Callable[[], int | None],
    ) -> None:
        """``stored_boots``: those of which no record waits any more; ``group_id``: of the server
        that is there now."""
        self._link, self._artifacts, self._scratch = link, artifacts, scratch
        self._refused = refused
        self._stored_boots, self._group_id = stored_boots, group_id
        self._stop = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="chores", daemon=True).start()

    def _run(self) -> None:
        self._try(self._sweep_unfinished)
        pause = FIRST_SECONDS
        while not self._stop.wait(pause):
            self.do()
            pause = EVERY_SECONDS

    def stop(self) -> None:
        self._stop.set()

    def do(self) -> None:
        """All of it once. Never raises: what goes wrong now is tried again."""
        for chore in (self._sweep_unfinished, self._sweep_orphans, self._forget_refused):
            self._try(chore)

    @staticmethod
    def _try(chore: Callable[[], None]) -> None:
        try:
            chore()
        except StoreAway:
            pass  # said in the log by the link
        except (AuroraError, OSError, SQLAlchemyError) as error:
            log.warning("can't tidy up: %s", str(error).splitlines()[0])
        except Exception:
            log.exception("tidying up failed")

    def _sweep_unfinished(self) -> None:
        count = litter.sweep(self._scratch) + self._artifacts.sweep()
        if count:
            log.info("%d files that killed processes left half written are deleted", count)

    def _sweep_orphans(self) -> None:
        with self._link.guard() as engine:
            sweep_traces(engine, self._artifacts, self._stored_boots())

    def _forget_refused(self) -> None:
        group_id = self._group_id()
        if group_id is None:
            return
        with self._link.session(write=False) as s:
            days = queries.limits.limits(s, group_id).refused_days
            cutoff = store_now(s) - timedelta(days=days)
        if count := self._refused.forget_before(cutoff):
            log.info("%d refused records from before %s are deleted", count, f"{cutoff:%Y-%m-%d}")
