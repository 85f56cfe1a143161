"""Which server speaks: boots by their Hello, and their rows in the store.

Of ``Hello.server`` the sidecar reads (strings unless said otherwise): ``name``, ``target_model``,
``target_revision``, ``draft_architecture``, ``drafter_path``, ``drafter_source`` (scratch |
import), ``dtype``, ``sglang_version``, ``aux_layers`` (list of int), ``live_sha256`` (of the
drafter at start), ``unknown_drafter`` (why nobody can tell which one that is: its requests are
recorded, no version goes live), ``plain_steps_possible`` (bool), and of the target
``target_hidden_size``, ``target_vocab_size`` and ``target_num_layers`` (int).
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from aurora_sgl import wire
from aurora_sgl.errors import AuroraError
from aurora_sgl.limits import Limits
from aurora_sgl.sidecar.spool.cursor import Cursor
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.liveness import STALE_SECONDS

#: Seconds in which records of a boot that is over wait for the drafter of the next one: it is
#: often the same.
GRACE_SECONDS = 15.0

NOT_IDENTIFIED = "the drafter that the server was started with is not known yet"

log = logging.getLogger(__name__)


@dataclass
class Registration:
    """A boot that has its row in ``server``."""

    server_id: int
    group_id: int
    boot_version_id: int | None
    refused: str = ""  # why its records must not be stored
    unknown_drafter: bool = False  # nobody will know any more: its version is 0

    def ready(self, hello: wire.Hello) -> bool:
        """Whether its records may be stored: which version 0 is must be known first."""
        settled = self.boot_version_id is not None or self.unknown_drafter
        return bool(self.refused) or settled or not drafter_path(hello)


def drafter_path(hello: wire.Hello) -> str:
    return str(hello.server.get("drafter_path") or "")


@dataclass
class ReportedLive:
    """What a boot last said of its drafter."""

    version_id: int = 0  # 0: the one that it was started with
    sha256: str = ""  # read back from the model
    since: float = 0.0  # time.monotonic() of the first Hello here; 0: none yet
    heard_at: float = 0.0  # and of the last
    hellos: int = 0


class Registry:
    """Boots that were heard, and which one is there now. Used by all threads."""

    def __init__(
        self, link: StoreLink, cursor: Cursor, group: str, limits: Limits | None = None
    ) -> None:
        """``limits``: what a group keeps that is made here."""
        self._link = link
        self._group = group
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._hellos = {b: boot.hello for b, boot in cursor.boots.items() if boot.hello}
        self._registrations: dict[int, Registration] = {}
        self._connects = 0
        self._swaps: list[wire.SwapDone | wire.LiveCopied] = []
        self._live: dict[int, ReportedLive] = {}
        self.news = threading.Event()  # set when the engine has answered to a swap
        self.current = 0  # boot that said hello last in this process; 0: none yet

    def heard(self, record: wire.Record) -> None:
        """Take note of a record as it arrives, before the store has it."""
        if isinstance(record, wire.Hello):
            with self._lock:
                self._hellos[record.boot_id] = record
                self.current = record.boot_id
                live = self._live.setdefault(record.boot_id, ReportedLive())
                if record.live_version_id != live.version_id:
                    live.version_id, live.sha256 = record.live_version_id, ""
                if not record.swap_count:  # afterwards SwapDone says it
                    live.sha256 = str(record.server.get("live_sha256") or live.sha256)
                live.heard_at = time.monotonic()
                live.since = live.since or live.heard_at
                live.hellos += 1
        elif isinstance(record, wire.SwapDone):
            with self._lock:
                self._swaps.append(record)
                if record.ok:
                    live = self._live.setdefault(record.boot_id, ReportedLive())
                    live.version_id, live.sha256 = record.version_id, record.live_sha256
            self.news.set()

        elif isinstance(record, wire.LiveCopied):
            with self._lock:
                self._swaps.append(record)
            self.news.set()

    def learn(self, hello: wire.Hello) -> None:
        """Remember a Hello that was read from the spool; it says nothing of the present."""
        with self._lock:
            self._hellos.setdefault(hello.boot_id, hello)

    def hello(self, boot_id: int) -> wire.Hello | None:
        with self._lock:
            return self._hellos.get(boot_id)

    def live(self, boot_id: int) -> ReportedLive:
        with self._lock:
            return self._live.setdefault(boot_id, ReportedLive())

    def take_swaps(self) -> list[wire.SwapDone | wire.LiveCopied]:
        """What the engine has said of swaps since the last call."""
        with self._lock:
            swaps, self._swaps = self._swaps, []
            return swaps

    def registration(self, boot_id: int) -> Registration | None:
        """The boot's row, made when needed. None: no Hello of it was heard.

        Raises ``StoreAway``.
        """
        self._link.engine()
        with self._lock:
            if self._connects != self._link.connects:
                self._connects = self._link.connects
                self._registrations.clear()
            registration = self._registrations.get(boot_id)
            hello = self._hellos.get(boot_id)
        if registration is not None or hello is None:
            return registration
        registration = self._register(hello)
        with self._lock:
            return self._registrations.setdefault(boot_id, registration)

    def current_group(self) -> int | None:
        """The group of the boot that is there now; None: it has no row yet."""
        with self._lock:
            registration = self._registrations.get(self.current)
        return None if registration is None else registration.group_id

    def forget(self) -> None:
        """Rows of servers are gone from the store: each is made again when it is asked for."""
        with self._lock:
            self._registrations.clear()

    def unsettled(self, boot_id: int) -> str:
        """Why records of a boot can't be stored yet; "" when they can. A boot that is over waits
        for nobody, so that it does not hold up the next. Raises ``StoreAway``."""
        registration, hello = self.registration(boot_id), self.hello(boot_id)
        if registration is None or hello is None:
            return "" if self._over(boot_id) else "the server has not said yet who it is"
        if registration.ready(hello):
            return ""
        if not self._over(boot_id):
            return NOT_IDENTIFIED
        return self._settle(boot_id, registration, hello)

    def _over(self, boot_id: int) -> bool:
        """Another boot has spoken, and this one has no more."""
        with self._lock:
            heard = self._live[boot_id].heard_at if boot_id in self._live else 0.0
            silent = not heard or time.monotonic() - heard > STALE_SECONDS
            return self.current not in (0, boot_id) and silent

    def _settle(self, boot_id: int, registration: Registration, hello: wire.Hello) -> str:
        """Find the drafter of a boot that is over among the versions; without it its records are
        stored as those of a drafter that is not in the store."""
        sha256 = str(hello.server.get("live_sha256") or "")
        with self._link.session() as s:
            version = (
                queries.versions.version_by_sha256(s, registration.group_id, sha256)
                if sha256
                else None
            )
            if version is not None:
                queries.servers.touch_server(s, registration.server_id, boot_version_id=version.id)
                registration.boot_version_id = version.id
                return ""
        if self._next_is_new():
            return "an earlier start's drafter may be the one that is being imported"
        registration.unknown_drafter = True
        log.warning("the drafter of boot %d is not known: its records name version 0", boot_id)
        return ""

    def _next_is_new(self) -> bool:
        """Whether the boot that is there now was just heard and has no version yet."""
        with self._lock:
            registration = self._registrations.get(self.current)
            hello = self._hellos.get(self.current)
            since = self._live[self.current].since
        if time.monotonic() - since > GRACE_SECONDS:
            return False
        if hello is None or not drafter_path(hello):
            return False
        return registration is None or not registration.ready(hello)

    def _register(self, hello: wire.Hello) -> Registration:
        description: dict[str, Any] = hello.server
        refused = ""
        with self._link.session() as s:
            # A boot stays in its group, also when this sidecar was started with another one.
            name = queries.servers.group_of_boot(s, hello.boot_id) or self._group
            try:
                group = queries.groups.ensure_group(
                    s,
                    name,
                    str(description.get("target_model", "")),
                    str(description.get("target_revision", "")),
                    str(description.get("draft_architecture", "")),
                )
            except AuroraError as error:
                refused = str(error)
                group = queries.groups.group_by_name(s, name)
                log.error("this server is not recorded: %s", refused)
            # Only a group that has none yet gets these: one server's settings bind no other's.
            queries.limits.ensure_limits(s, group.id, self._limits, str(description.get("name")))
            server = queries.servers.register_server(s, group.id, hello)
            if refused:
                queries.servers.touch_server(s, server.id, state="stopped", last_error=refused)
            registration = Registration(server.id, group.id, server.boot_version_id, refused)
        return registration
