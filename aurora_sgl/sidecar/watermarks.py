"""What the store should have of each boot, held against what it has."""

from __future__ import annotations

import contextlib
import logging
import time

from aurora_sgl.sidecar.ledger import give_up_forgotten, losses
from aurora_sgl.sidecar.servers import Registry
from aurora_sgl.sidecar.spool.cursor import Boot, Cursor
from aurora_sgl.sidecar.spool.log import Spool
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreAway, StoreLink

#: Seconds after which nobody asks any more whether the store still has what it took of a boot.
COMPARE_SECONDS = 3600.0

log = logging.getLogger(__name__)


class Watermarks:
    """Used by the batcher's thread alone."""

    def __init__(self, spool: Spool, cursor: Cursor, link: StoreLink, registry: Registry) -> None:
        self._spool = spool
        self._cursor = cursor
        self._link = link
        self._registry = registry
        self._compared = 0  # StoreLink.connections when the store was last compared
        self._met: set[int] = set()  # boots of which the store was asked what it has
        #: By boot whose cursor was lost: up to where its losses were counted before.
        self.recovered: dict[int, int] = {}
        self._losses: dict[int, dict[str, int]] = {}  # that the store has, by server
        self.rewinds = 0

    def meet(self, boot_id: int) -> tuple[Boot, bool]:
        """What is known of a boot, and whether its records are stored at all. Of one that this
        sidecar has not met yet the store is asked: a cursor can be lost, or be old."""
        boot = self._cursor.boot(boot_id)
        registration = self._registry.registration(boot_id)
        if registration is None or registration.refused:
            return boot, False
        if boot_id not in self._met:
            with self._link.session(write=False) as s:
                boot.ahead = queries.watermarks.watermark(s, registration.server_id, boot_id)
                lost = queries.drops.drops_of_server(s, registration.server_id)
            if boot.ahead and not boot.last_seq:
                self.recovered[boot_id] = boot.ahead
                boot.transport = lost.get("transport", 0)
                boot.spool_full = lost.get("spool", 0)
                boot.rejected = lost.get("rejected", 0)
                boot.forgotten = lost.get("store", 0)
            self._met.add(boot_id)
        return boot, True

    def compare(self) -> None:
        """On a new connection: has the database what it had? Raises ``StoreAway``."""
        connections = self._link.connections
        if connections == self._compared:
            return
        self._losses.clear()
        now = time.time()
        stored = {
            boot_id: boot.stored
            for boot_id, boot in self._cursor.boots.items()
            if boot.stored and now - boot.stored_at < COMPARE_SECONDS
        }
        if stored:
            with self._link.session(write=False) as s:
                taken = queries.watermarks.watermarks(s, stored)
            behind = {
                boot_id: taken.get(boot_id, 0)
                for boot_id, last in stored.items()
                if taken.get(boot_id, 0) < last
            }
            if behind:
                self.read_again(behind)
        self._compared = connections

    def read_again(self, boots: dict[int, int]) -> None:
        """The store has these boots up to these numbers only; it had more."""
        log.warning(
            "the store has forgotten what it had of %d starts of servers (a failover to a replica "
            "that was behind, or a restore); what the spool still has is read again",
            len(boots),
        )
        self.rewinds += 1
        self._cursor.again(boots, self._spool.rewind())
        self._registry.forget()
        self._losses.clear()
        self.settle()

    def settle(self) -> None:
        """Once all was read again: count what the spool no longer had."""
        if self._cursor.position < self._cursor.until:
            return
        for boot_id, boot in self._cursor.boots.items():
            if boot.behind:
                give_up_forgotten(boot)
                with contextlib.suppress(StoreAway):
                    registration = self._registry.registration(boot_id)
                    if registration is not None and not registration.refused:
                        self.tell_losses(registration.server_id, boot)

    def row_is_gone(self) -> None:
        """A row that others hang on is not there. In the same database somebody deleted it, and
        what hung on it with it: that is not to come back."""
        self._registry.forget()
        self._losses.clear()
        if self._link.connections == self._compared:
            for boot in self._cursor.boots.values():
                boot.stored = 0

    def tell_losses(self, server_id: int, boot: Boot) -> None:
        """Where they are others than the store has. Raises ``StoreAway``."""
        counts = losses(boot)
        if self._losses.get(server_id) == counts:
            return
        with self._link.session() as s:
            for place, count in counts.items():
                queries.drops.set_drops(s, server_id, place, count)
        self._losses[server_id] = counts
