"""Once a second, and when a swap is done: what should be live, what is, what the engine is told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from aurora_sgl import clock, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import Settings
from aurora_sgl.errors import AuroraError, Unusable
from aurora_sgl.rollout.switches import LEARNING
from aurora_sgl.sidecar import boot_version, phase
from aurora_sgl.sidecar.servers import Registration, Registry, ReportedLive, drafter_path
from aurora_sgl.sidecar.swap.attempt import Swaps
from aurora_sgl.sidecar.swap.staging import Stager, Wanted
from aurora_sgl.sidecar.tree_keeper import TreeKeeper
from aurora_sgl.step_cost import StepCost
from aurora_sgl.store import queries
from aurora_sgl.store.ghosts import GhostWatch
from aurora_sgl.store.housekeeper import Housekeeper
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.liveness import is_silent
from aurora_sgl.store.store_clock import StoreNow, store_now

TICK_SECONDS = 1.0
PHASE_SECONDS = 5.0
TIDY_SECONDS = 10.0
#: Heartbeats after which the server's row is written although nothing changed: much sooner than
#: others would hold it for gone.
REPORT_HELLOS = 3
#: Seconds after a swap when every stream has made its next step.
STALL_SECONDS = 4.0
#: Seconds back over which what was served tells the accept length of the live version.
LIVE_SECONDS = 3600.0
IDENTIFY_BACKOFF = (2.0, 60.0)
#: Seconds for which records wait for a drafter that can't be imported now, and may be later.
IDENTIFY_PATIENCE = 60.0

_DRAFTER = "drafter"

log = logging.getLogger(__name__)


class Reconciler:
    """The control loop of the boot that is there now. One thread."""

    def __init__(
        self,
        settings: Settings,
        link: StoreLink,
        registry: Registry,
        artifacts: ArtifactRoot,
        stager: Stager,
        send: Callable[[wire.Command], bool],
        traces_lost: Callable[[], int],
        stall_of: Callable[[wire.SwapDone], float | None],
    ) -> None:
        self._settings = settings
        self._link = link
        self._registry = registry
        self._artifacts = artifacts
        self._send = send
        self._traces_lost = traces_lost
        self._stall_of = stall_of
        self._swapped: list[tuple[float, wire.SwapDone]] = []  # whose stall is still to be told
        self._traces_told = 0
        self.swaps = Swaps(stager, send)
        self._trees = TreeKeeper(link, send)
        self._stop = threading.Event()
        self._ghosts = GhostWatch()
        self._housekeeper = Housekeeper(link, artifacts, "sidecar", stands_in=True)
        self._boot_id = 0
        self._reported: dict[str, Any] = {}
        self._told_hellos = -1  # ReportedLive.hellos when the engine was told its version
        self._told_store = -1  # ReportedLive.hellos when the store was told of the engine
        self._phase_at = 0.0
        self._tidy_at = 0.0
        self._identify_at = 0.0
        self._identify_failures = 0
        self._identify_since = 0.0  # of the first failure
        self._error = ""
        self.standing: dict[str, str] = {}  # code -> what is off as long as this server runs
        self.phase = phase.Phase("", 0.0, "")
        self.agrees = False
        self.desired = 0
        self.boot_version_id = 0  # of the boot that is there now; 0: not known yet

    @property
    def error(self) -> str:
        """What stands in the way of the version that should be live; "" when nothing does."""
        return self._error

    def run(self) -> None:
        while not self._stop.is_set():
            self._registry.news.wait(TICK_SECONDS)  # what went live is reported at once
            self._registry.news.clear()
            if self._stop.is_set():
                return
            try:
                self.tick()
            except StoreAway:
                pass
            except (SQLAlchemyError, AuroraError, OSError) as error:
                log.error("control loop: %s", str(error).splitlines()[0])
            except Exception:
                log.exception("the control loop failed; trying again")

    def stop(self) -> None:
        self._stop.set()
        self._housekeeper.stop(0)
        self._registry.news.set()

    def tick(self) -> None:
        """One round. Raises ``StoreAway``."""
        boot_id = self._registry.current
        hello = self._registry.hello(boot_id)
        if hello is None:
            return
        if boot_id != self._boot_id:
            self._boot_id, self._reported, self._error = boot_id, {}, ""
            self._identify_at, self._identify_failures = 0.0, 0
            self.standing.pop(_DRAFTER, None)
            self._told_hellos = self._told_store = -1
            self.phase = phase.Phase("", 0.0, "")
            self._phase_at = self._tidy_at = 0.0
        registration = self._registry.registration(boot_id)
        assert registration is not None
        if registration.refused:
            self.agrees = False
            return
        if registration.boot_version_id is None and drafter_path(hello):
            self._identify(registration, hello)
        self.boot_version_id = registration.boot_version_id or 0
        live = self._registry.live(boot_id)
        self._answers(boot_id)
        self._capture(registration, hello)
        if registration.boot_version_id is not None:
            self._tell_identity(registration, live)
            self._reconcile(registration, hello, live)
        else:
            # A server without a drafter has none to swap, nor has one whose drafter is unknown.
            self.agrees = not drafter_path(hello) or registration.unknown_drafter
        self._decide_phase(registration, hello, live)
        self._trees.tick(registration, hello)
        self._report(registration, live)
        self._tell_stalls(registration)
        self._tidy(registration)

    def _identify(self, registration: Registration, hello: wire.Hello) -> None:
        """Records wait for it, unless nobody will ever know, or it takes too long."""
        now = time.monotonic()
        if now < self._identify_at:
            return
        try:
            boot_version.identify(self._link, self._artifacts, registration, hello)
        except Unusable as error:
            self._identify_at = float("inf")
            self._is_unknown(registration, str(error))
        except (AuroraError, OSError) as error:
            low, high = IDENTIFY_BACKOFF
            pause = min(low * 2**self._identify_failures, high)
            if not self._identify_failures:
                self._identify_since = now
            self._identify_failures += 1
            self._identify_at = now + pause
            self._error = f"the drafter {drafter_path(hello)} can't be imported: {error}"
            if now - self._identify_since >= IDENTIFY_PATIENCE:
                self._is_unknown(registration, self._error)
            log.error("%s; next try in %.0f s", self._error, pause)
        else:
            self._error = ""
            self.standing.pop(_DRAFTER, None)
            registration.unknown_drafter = False

    def _is_unknown(self, registration: Registration, why: str) -> None:
        self._error = ""
        line = (
            f"The drafter of this server is unknown: {why.rstrip('.')}. Its requests are recorded "
            "without a version, and no version goes live here."
        )
        if not registration.unknown_drafter:
            log.error("%s", line)
        registration.unknown_drafter = True
        self.standing[_DRAFTER] = line

    def _tell_identity(self, registration: Registration, live: ReportedLive) -> None:
        """Once per Hello of an engine that does not know yet what it was started with."""
        if live.version_id == 0 and live.hellos != self._told_hellos:
            assert registration.boot_version_id is not None
            if self._send(wire.Identify(registration.boot_version_id)):
                self._told_hellos = live.hellos

    def _answers(self, boot_id: int) -> None:
        for done in self._registry.take_swaps():
            if done.boot_id != boot_id:
                continue
            if isinstance(done, wire.LiveCopied):
                self.swaps.copied(done)
            else:
                self._error = self.swaps.answered(done)
                if done.ok:
                    self._swapped.append((time.monotonic(), done))
        if late := self.swaps.expire(boot_id):
            self._error = late

    def _capture(self, registration: Registration, hello: wire.Hello) -> None:
        """While learning is switched off nothing new is captured, nor by a server that may keep
        nothing."""
        with self._link.session(write=False) as s:
            learning = queries.switches.is_on(s, registration.group_id, LEARNING)
        wanted = self._settings.capture_share if learning and self._settings.capture_bytes else 0.0
        if hello.counters.get("capture_share", wanted) != wanted:
            self._send(wire.SetCapture(wanted))

    def _reconcile(self, registration: Registration, hello: wire.Hello, live: ReportedLive) -> None:
        with self._link.session(write=False) as s:
            desired = queries.aliases.wanted_by_server(s, registration.server_id)
            if desired is None:
                self.agrees = True
                return
            version_id, generation = desired.version_id, desired.generation
            version = queries.versions.version(s, version_id)
            wanted = Wanted(version.id, version.weights_uri, version.weights_sha256)
        self.desired = version_id
        present = live.version_id or registration.boot_version_id
        wrong_bytes = bool(live.sha256) and live.sha256 != wanted.weights_sha256
        self.agrees = present == version_id and not wrong_bytes
        if self.agrees:
            if not self.swaps.busy:
                self._error = ""
        elif not self.swaps.busy and (failed := self.swaps.begin(wanted, generation, hello)):
            self._error = failed

    def _decide_phase(
        self, registration: Registration, hello: wire.Hello, live: ReportedLive
    ) -> None:
        if time.monotonic() < self._phase_at:
            return
        self._phase_at = time.monotonic() + PHASE_SECONDS
        expected = None
        version_id = live.version_id or registration.boot_version_id
        if self._settings.speculation == "auto" and version_id is not None:
            with self._link.session(write=False) as s:
                expected = self._expected(s, registration.group_id, version_id)
        length = round(expected.accept_length, 2) if expected is not None else 0.0
        if registration.unknown_drafter:
            expected = phase.measured(hello.counters)
        decided = phase.decide(
            self._settings.speculation,
            self._settings.explore_share,
            StepCost.of(hello.counters),
            expected,
            self.phase.name,
            hello.server.get("plain_steps_possible") is not False,
        )
        if (decided.name, decided.share) != (self.phase.name, self.phase.share):
            log.info("%s, share %.2f: %s", decided.name, decided.share, decided.reason)
        current = (
            float(hello.counters.get("speculation_share", -1.0)),
            float(hello.counters.get("hoped_accept_length", length)),
        )
        wanted = (decided.share, length)
        if current == wanted or self._send(wire.SetPhase(decided.share, decided.reason, length)):
            self.phase = decided

    @staticmethod
    def _expected(s: Session, group_id: int, version_id: int) -> phase.Expected | None:
        replays = [
            evaluation.candidate_accept_length
            for evaluation in queries.evaluations.evaluations(s, version_id)
            if evaluation.kind == "replay"
            and not evaluation.domain
            and evaluation.candidate_accept_length
        ]
        since = clock.utc_now() - timedelta(seconds=LIVE_SECONDS)
        steps = accepted = 0
        for row in queries.accept_lengths.accept_length_by_version(s, group_id, since=since):
            if row.version_id == version_id:
                steps, accepted = row.verify_steps, row.accepted
        return phase.expected(replays[0] if replays else None, steps, accepted)

    def _report(self, registration: Registration, live: ReportedLive) -> None:
        """Write the server's row when something of it changed, and now and then, since ingest,
        which writes what a Hello says and when it came, may have to wait."""
        fields: dict[str, Any] = {
            "state": "running",
            "live_version_id": live.version_id or registration.boot_version_id,
            "live_sha256": live.sha256,
            "phase": self.phase.name,
            "speculation_share": self.phase.share,
            "phase_reason": self.phase.reason,
            "last_error": self._error or " ".join(self.standing.values()),
        }
        if fields == self._reported and live.hellos - self._told_store < REPORT_HELLOS:
            return
        with self._link.session() as s:
            heard = StoreNow(time.monotonic() - live.heard_at)
            if queries.servers.report_server(
                s, registration.server_id, **fields, last_seen_at=heard
            ):
                log.info("this server counted as gone, and is back")
        self._reported, self._told_store = fields, live.hellos

    def _tell_stalls(self, registration: Registration) -> None:
        """Some seconds after a swap every stream has made a step, and the swap has its row."""
        while self._swapped and time.monotonic() - self._swapped[0][0] > STALL_SECONDS:
            done = self._swapped[0][1]
            stall = self._stall_of(done)
            if stall is not None:
                with self._link.session() as s:
                    queries.swaps.set_stall(
                        s, registration.server_id, clock.from_us(done.at_us), stall
                    )
            del self._swapped[0]

    def _tidy(self, registration: Registration) -> None:
        """Mark what dead boots of this server left running as lost, and other servers of the group
        that nobody hears of as gone; prune the group when that is due and no scheduler does it."""
        if time.monotonic() < self._tidy_at:
            return
        self._tidy_at = time.monotonic() + TIDY_SECONDS
        with self._link.guard() as engine:
            self._ghosts.tick(engine, registration.group_id)
        self._housekeeper.look(registration.group_id)
        with self._link.session(write=False) as s:
            now = store_now(s)
            others = queries.servers.earlier_boots(
                s, queries.servers.server(s, registration.server_id)
            )
            dead = [(o.id, o.boot_id) for o in others if is_silent(o.last_seen_at, now)]
        fresh = self._traces_lost() - self._traces_told
        if not dead and not fresh:
            return
        with self._link.session() as s:
            lost = sum(queries.servers.mark_lost(s, *boot) for boot in dead)
            queries.drops.add_drops(s, registration.server_id, "trace", fresh)
        self._traces_told += fresh
        if lost:
            log.info("%d requests of earlier boots are lost", lost)

    def farewell(self, engine_is_gone: bool) -> None:
        """Say in the server's row that it is gone, or going. Raises ``StoreAway``."""
        registration = self._registry.registration(self._registry.current)
        if registration is not None and not registration.refused:
            with self._link.session() as s:
                if engine_is_gone:
                    queries.servers.mark_lost(s, registration.server_id, self._registry.current)
                queries.servers.touch_server(s, registration.server_id, state="stopped")
