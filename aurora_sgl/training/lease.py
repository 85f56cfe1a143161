"""One training run of a group at a time, on whatever machine it runs."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries

#: A trainer that says nothing for this long is taken for dead.
LEASE_SECONDS = 300.0


@contextmanager
def training_lease(
    engine: Engine, group_id: int, seconds: float = LEASE_SECONDS
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Hold the lease ``train:<group>``; yields a progress callback that renews it now and then.

    Raises ``AuroraError`` when another trainer holds it, and from the callback when it was lost.
    """
    name = f"train:{group_id}"
    holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    with store.session(engine) as s:
        token = queries.acquire_lease(s, name, holder, seconds)
        held = queries.lease(s, name)
    if token is None:
        who = held.holder.rpartition(":")[0] if held is not None else "another trainer"
        raise AuroraError(f"a training run of this group is going on ({who}); wait until it ends")
    renewed = time.monotonic()

    def renew(_: dict[str, Any]) -> None:
        nonlocal renewed
        if time.monotonic() - renewed < seconds / 10:
            return
        with store.session(engine) as s:
            if not queries.renew_lease(s, name, holder, token, seconds):
                raise AuroraError("the training lease was lost to another trainer; this run stops")
        renewed = time.monotonic()

    try:
        yield renew
    finally:
        with store.session(engine) as s:
            queries.release_lease(s, name, holder, token)
