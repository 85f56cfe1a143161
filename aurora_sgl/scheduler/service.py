"""The scheduler as a process: its rounds, health and metrics, an orderly end.

Rounds come by the monotonic clock. APScheduler goes by the time of day: after a clock that was set
back it waited for the old time to come again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from aurora_sgl import environment as variables
from aurora_sgl import logs, store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import NotifySettings, SchedulerSettings, Settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.health import HealthServer, Sample
from aurora_sgl.private import settle
from aurora_sgl.processes.ending import Ending
from aurora_sgl.scheduler import metrics
from aurora_sgl.scheduler.loop import Scheduler
from aurora_sgl.scheduler.teller import Teller
from aurora_sgl.sequences.splits import GATE_SHARE
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.liveness import STALE_SECONDS

if TYPE_CHECKING:
    from aurora_sgl.scheduler.api import ApiServer

TICK_SECONDS = 1.0
#: Seconds after which a round will not end by itself: longer than all that it may wait for.
STUCK_SECONDS = 300.0
#: Seconds between two readings of what the store knows of the group, for the metrics.
METRICS_SECONDS = 10.0

log = logging.getLogger(__name__)


class SchedulerService:
    """One scheduler with its clock and its endpoint."""

    def __init__(
        self,
        scheduler: Scheduler,
        rules: SchedulerSettings,
        notify: NotifySettings | None = None,
    ) -> None:
        """Raises ``AuroraError`` for ``notify`` that names what there is not, and for an API whose
        token would be guessed or whose port is taken."""
        self.scheduler = scheduler
        self._teller = Teller(scheduler, notify or NotifySettings())
        self._rules = rules
        self._done_at = 0.0
        self._begun_at = time.monotonic()  # of the round that goes on, or of the last one
        self._reason = "it has just started"
        self._samples: list[Sample] = []
        self._took = metrics.rounds()
        self._complained = ""
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self._ending = threading.Event()
        # One thread for everything: rounds never overlap, and a training run lives as long as it.
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
        self.health: HealthServer | None = None
        self._api = _api(scheduler, rules)

    def start(self) -> None:
        if self._rules.port >= 0:
            self.health = HealthServer(
                self._rules.host,
                self._rules.port,
                self.status,
                self._all_samples,
                stuck=self.stuck,
                or_free="port" not in self._rules.model_fields_set,
            )
            if self.health.url:
                log.info("health and metrics at %s", self.health.url)
        if self._api is not None:
            self._api.start()
        self._thread.start()
        self._teller.start()

    def stop(self) -> None:
        """End the run that goes on, give the lease back, stop answering."""
        self._ending.set()
        self._teller.stop()
        if self._api is not None:
            self._api.stop()
        self._thread.join(20.0)
        if self.health is not None:
            self.health.close()

    def _run(self) -> None:
        measure_at = 0.0
        while not self._ending.is_set():
            self._begun_at = begun = time.monotonic()
            self._round()
            self._took.observe(time.monotonic() - begun)
            if begun >= measure_at:
                self._measure()
                measure_at = begun + METRICS_SECONDS
            self._ending.wait(max(0.0, begun + TICK_SECONDS - time.monotonic()))
        with contextlib.suppress(StoreAway):
            self.scheduler.close()

    def _round(self) -> None:
        try:
            self.scheduler.tick()
        except StoreAway as away:
            self._reason = f"the store is away: {away}"
        except (AuroraError, SQLAlchemyError, OSError) as error:
            self._complain(str(error).splitlines()[0])
        except Exception:
            self._complain("a round failed")
            log.exception("a round failed; trying again")
        else:
            self._done_at, self._reason, self._complained = time.monotonic(), "", ""

    def _complain(self, line: str) -> None:
        if line != self._complained:
            log.error("%s; trying again", line)
        self._complained = self._reason = line

    def _measure(self) -> None:
        if not self.scheduler.group_id:
            return
        try:
            with self.scheduler.link.session(write=False) as s:
                share = float(self.scheduler.recipe.get("gate_share", GATE_SHARE))
                self._samples = metrics.of_group(s, self.scheduler.group_id, share)
        except StoreAway:
            pass
        except Exception:
            log.exception("the metrics of the group stay as they were; trying again")

    def status(self) -> dict[str, Any]:
        """Ready: rounds are done, and the store answered the last one."""
        age = time.monotonic() - self._done_at
        reason = self._reason
        if not reason and age > STALE_SECONDS:
            reason = f"no round for {age:.0f} s"
        hold = self.scheduler.hold
        return {
            "ready": not reason,
            "reason": reason,
            "group": self.scheduler.group,
            "role": "leader" if hold.held else "standby",
            "leader": hold.holder,
            "state": self.scheduler.state,
        }

    def stuck(self) -> str:
        """Why another process should take its place; "" while rounds come, or wait for the store,
        which ends by itself."""
        if self._thread.ident is not None and not self._thread.is_alive():
            return "" if self._ending.is_set() else "its rounds have ended"
        age = time.monotonic() - self._begun_at
        return f"a round goes on for {age:.0f} s" if age > STUCK_SECONDS else ""

    def _all_samples(self) -> list[Sample]:
        age = time.monotonic() - self._done_at
        mine = metrics.of_itself(self.scheduler, self.scheduler.state, age, self._took)
        return [*mine, *self._samples]


def _api(scheduler: Scheduler, rules: SchedulerSettings) -> ApiServer | None:
    """The read-only API, where a token is set."""
    if not rules.api_token.get_secret_value():
        return None
    from aurora_sgl.scheduler.api import ApiServer  # FastAPI takes half a second

    return ApiServer(scheduler.link, scheduler.group, rules)


def run(
    settings: Settings,
    rules: SchedulerSettings,
    *,
    group: str = "",
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Until SIGTERM or Ctrl-C. A store that is away is waited for.

    Raises ``AuroraError`` for one in which this user or role may not write.
    """
    logs.begin(variables.logs_as_json())
    store.require_writable(settings.store_url)
    if line := settle(settings.home, settings.artifact_root, settings.artifact_access):
        log.warning("%s", line)
    ending = Ending()
    ending.on_signals(signal.SIGTERM, signal.SIGINT)
    environment = {"AURORA_HOME": str(settings.home.resolve())}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = "1"
    scheduler = Scheduler(
        StoreLink(settings.store_url, "training that goes on goes on"),
        group or settings.group,
        rules,
        recipe=recipe,
        environment=environment,
        files=ArtifactRoot(settings.artifact_root),
    )
    service = SchedulerService(scheduler, rules)
    service.start()
    log.info("scheduler of group %s", scheduler.group)
    ending.wait()
    log.info("stopping")
    service.stop()
