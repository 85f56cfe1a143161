"""Servers that went without a word, whatever their name: a pod that was replaced never says so.

By the store's clock, which all machines share. What counts is silence that somebody was there to
hear: after an outage of the store everybody was silent, and nobody is gone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime

from sqlalchemy import Engine

from aurora_sgl.store import queries
from aurora_sgl.store.connection import session
from aurora_sgl.store.liveness import GHOST_SECONDS

#: Seconds between two looks, for which a silence must go on while we are there, and after which an
#: earlier look says nothing any more.
LOOK_SECONDS, LISTENED_SECONDS, DEAF_SECONDS = 10.0, 30.0, 60.0

log = logging.getLogger(__name__)


class GhostWatch:
    """Ends the servers of a group that nobody hears of. One thread."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._looked = float("-inf")
        self._silent: dict[int, tuple[datetime, float]] = {}  # id -> last word, and heard so since

    def tick(self, engine: Engine, group_id: int) -> list[str]:
        """Look when it is time to; the names of the servers that are gone since now. Raises what
        the database raises."""
        now = self._monotonic()
        if now - self._looked < LOOK_SECONDS:
            return []
        if now - self._looked > DEAF_SECONDS:
            self._silent.clear()
        with session(engine, write=False) as s:
            silent = queries.servers.silent_servers(s, group_id, GHOST_SECONDS)
        self._looked = now
        before, self._silent = self._silent, {}
        ended = []
        for server in silent:
            last_word, since = before.get(server.id, (server.last_seen_at, now))
            since = since if last_word == server.last_seen_at else now
            self._silent[server.id] = (server.last_seen_at, since)
            if now - since < LISTENED_SECONDS:
                continue
            with session(engine) as s:
                lost = queries.servers.end_silent(s, server, GHOST_SECONDS)
            if lost is not None:
                ended.append(server.name)
                log.warning(
                    "server %s (boot %d) was last heard of at %s UTC and counts as gone; "
                    "%d of its requests are lost",
                    server.name, server.boot_id, f"{server.last_seen_at:%Y-%m-%d %H:%M:%S}", lost,
                )  # fmt: skip
        return ended
