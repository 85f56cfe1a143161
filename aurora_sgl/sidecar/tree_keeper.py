"""Keeps in the store what the server learnt of its trees, and tells it to the next boot."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aurora_sgl import wire
from aurora_sgl.sidecar.servers import Registration
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.upsert import storable

log = logging.getLogger(__name__)


class TreeKeeper:
    """For the boot that is there now. ``name``: of the server, the same for each of its boots."""

    def __init__(self, link: StoreLink, send: Callable[[wire.Command], bool]) -> None:
        self._link = link
        self._send = send
        self._told_boot = 0  # that was told what there is
        self._kept: object = None  # last state that was written

    def tick(self, registration: Registration, hello: wire.Hello) -> None:
        """Raises ``StoreAway``."""
        version_id = hello.live_version_id or registration.boot_version_id
        name = storable(str(hello.server.get("name", "")))
        if hello.counters.get("trees", 0.0) != 1.0 or version_id is None:
            return
        if self._told_boot != hello.boot_id:
            with self._link.session(write=False) as s:
                memory = queries.tree_memories.tree_memory(s, registration.group_id, name)
                state = memory.state if memory is not None else None
                same = memory is not None and memory.version_id == version_id
            if state is None or self._send(wire.Trees(state, same)):
                self._told_boot = hello.boot_id
        elif hello.trees and hello.trees is not self._kept:
            with self._link.session() as s:
                queries.tree_memories.set_tree_memory(
                    s, registration.group_id, name, version_id=version_id, state=hello.trees
                )
            self._kept = hello.trees
