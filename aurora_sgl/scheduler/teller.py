"""The scheduler's thread that tells people: looks for what happened, and sends it."""

from __future__ import annotations

import logging
import threading
import time

from aurora_sgl.config import NotifySettings
from aurora_sgl.scheduler import notifications
from aurora_sgl.scheduler.courier import Courier
from aurora_sgl.scheduler.loop import Scheduler
from aurora_sgl.store.link import StoreAway

#: Seconds between two looks for what happened, between two rounds of sending, and of forgetting.
LOOK_SECONDS, SEND_SECONDS, FORGET_SECONDS = 5.0, 1.0, 3600.0

log = logging.getLogger(__name__)


class Teller:
    """Beside the rounds, which never wait for a receiver. Only the scheduler that leads tells."""

    def __init__(self, scheduler: Scheduler, settings: NotifySettings) -> None:
        """Raises ``AuroraError`` for settings that name what there is not."""
        notifications.kinds(settings)
        self._scheduler, self._settings = scheduler, settings
        self._courier = Courier(scheduler.link, scheduler.group, settings)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="teller", daemon=True)
        self._look_at = self._forget_at = 0.0
        self._complained = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the round that goes on end; what was not told yet waits in the store."""
        self._ending.set()
        self._thread.join(self._settings.seconds + 5.0)
        self._courier.close()

    def _run(self) -> None:
        while not self._ending.wait(SEND_SECONDS):
            self._round()

    def _round(self) -> None:
        if not self._scheduler.group_id or not self._scheduler.hold.held:
            return
        try:
            self._tell()
            self._complained = ""
        except StoreAway:
            pass
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            if line != self._complained:
                log.exception("telling people failed; trying again")
            self._complained = line

    def _tell(self) -> None:
        group, moment = self._scheduler.group, time.monotonic()
        if moment >= self._look_at:
            with self._scheduler.link.guard() as engine:
                notifications.look(engine, group, self._settings)
            self._look_at = moment + LOOK_SECONDS
        if moment >= self._forget_at:
            with self._scheduler.link.guard() as engine:
                notifications.forget(engine, group, self._settings)
            self._forget_at = moment + FORGET_SECONDS
        self._courier.round(self._scheduler.group_id)
