"""Which server speaks: boots by their Hello, and their rows in the store.

Of ``Hello.server`` the sidecar reads (strings unless said otherwise): ``name``, ``target_model``,
``target_revision``, ``draft_architecture``, ``drafter_path``, ``drafter_source`` (scratch |
import), ``dtype``, ``sglang_version``, ``aux_layers`` (list of int), ``live_sha256`` (of the
drafter at start), ``plain_steps_possible`` (bool), and of the target ``target_hidden_size``,
``target_vocab_size`` and ``target_num_layers`` (int).
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from aurora_sgl import wire
from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.cursor import Cursor
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreLink

log = logging.getLogger(__name__)


@dataclass
class Known:
    """A boot that has its row in ``server``."""

    server_id: int
    group_id: int
    boot_version_id: int | None
    refused: str = ""  # why its records must not be stored

    def ready(self, hello: wire.Hello) -> bool:
        """Whether its records may be stored: which version 0 is must be known first."""
        return bool(self.refused) or self.boot_version_id is not None or not drafter_path(hello)


def drafter_path(hello: wire.Hello) -> str:
    return str(hello.server.get("drafter_path") or "")


@dataclass
class Live:
    """What a boot last said of its drafter."""

    version_id: int = 0  # 0: the one that it was started with
    sha256: str = ""  # read back from the model
    heard_at: float = 0.0  # time.monotonic()
    hellos: int = 0


class Registry:
    """Boots that were heard, and which one is there now. Used by all threads."""

    def __init__(self, link: StoreLink, cursor: Cursor, group: str) -> None:
        self._link = link
        self._group = group
        self._lock = threading.Lock()
        self._hellos = {b: boot.hello for b, boot in cursor.boots.items() if boot.hello}
        self._known: dict[int, Known] = {}
        self._connects = 0
        self._swaps: list[wire.SwapDone] = []
        self._live: dict[int, Live] = {}
        self.news = threading.Event()  # set when the engine has answered to a swap
        self.current = 0  # boot that said hello last in this process; 0: none yet

    def heard(self, record: wire.Record) -> None:
        """Take note of a record as it arrives, before the store has it."""
        if isinstance(record, wire.Hello):
            with self._lock:
                self._hellos[record.boot_id] = record
                self.current = record.boot_id
                live = self._live.setdefault(record.boot_id, Live())
                if record.live_version_id != live.version_id:
                    live.version_id, live.sha256 = record.live_version_id, ""
                if not record.swap_count:  # afterwards SwapDone says it
                    live.sha256 = str(record.server.get("live_sha256") or live.sha256)
                live.heard_at = time.monotonic()
                live.hellos += 1
        elif isinstance(record, wire.SwapDone):
            with self._lock:
                self._swaps.append(record)
                if record.ok:
                    live = self._live.setdefault(record.boot_id, Live())
                    live.version_id, live.sha256 = record.version_id, record.live_sha256
            self.news.set()

    def learn(self, hello: wire.Hello) -> None:
        """Remember a Hello that was read from the spool; it says nothing of the present."""
        with self._lock:
            self._hellos.setdefault(hello.boot_id, hello)

    def hello(self, boot_id: int) -> wire.Hello | None:
        with self._lock:
            return self._hellos.get(boot_id)

    def live(self, boot_id: int) -> Live:
        with self._lock:
            return self._live.setdefault(boot_id, Live())

    def take_swaps(self) -> list[wire.SwapDone]:
        with self._lock:
            swaps, self._swaps = self._swaps, []
            return swaps

    def known(self, boot_id: int) -> Known | None:
        """The boot's row, made when needed. None: no Hello of it was heard.

        Raises ``StoreAway``.
        """
        self._link.engine()
        with self._lock:
            if self._connects != self._link.connects:
                self._connects = self._link.connects
                self._known.clear()
            known = self._known.get(boot_id)
            hello = self._hellos.get(boot_id)
        if known is not None or hello is None:
            return known
        known = self._register(hello)
        with self._lock:
            return self._known.setdefault(boot_id, known)

    def _register(self, hello: wire.Hello) -> Known:
        said: dict[str, Any] = hello.server
        refused = ""
        with self._link.session() as s:
            try:
                group = queries.ensure_group(
                    s,
                    self._group,
                    str(said.get("target_model", "")),
                    str(said.get("target_revision", "")),
                    str(said.get("draft_architecture", "")),
                )
            except AuroraError as error:
                refused = str(error)
                group = queries.group_by_name(s, self._group)
                log.error("this server is not recorded: %s", refused)
            server = queries.register_server(s, group.id, hello)
            if refused:
                queries.touch_server(s, server.id, state="stopped", last_error=refused)
            known = Known(server.id, group.id, server.boot_version_id, refused)
        return known
