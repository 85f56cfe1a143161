"""One training run of a group at a time, on whatever machine it runs, and none while learning is
switched off."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout.switches import LEARNING, LEARNING_WENT_OFF
from aurora_sgl.store import queries
from aurora_sgl.store.faults import in_words, is_away
from aurora_sgl.store.liveness import (
    TRAINING_LEASE_SECONDS,
    name_of_this_process,
    training_lease_name,
)

#: Seconds between two looks at the kill switch.
LOOK_SECONDS = 2.0

log = logging.getLogger(__name__)


def _acquire(engine: Engine, group_id: int, name: str, holder: str, seconds: float) -> int:
    """The fencing token. Raises ``AuroraError`` when the lease can't be had."""
    with store.session(engine) as s:
        if not queries.switches.is_on(s, group_id, LEARNING):
            raise AuroraError("learning is switched off; see: aurora-sgl switch list")
        token = queries.leases.acquire_lease(s, name, holder, seconds)
        held = queries.leases.lease(s, name)
    if token is None:
        who = held.holder.rpartition(":")[0] if held is not None else "another trainer"
        raise AuroraError(f"a training run of this group is going on ({who}); wait until it ends")
    return token


@contextmanager
def training_lease(
    engine: Engine, group_id: int, seconds: float = TRAINING_LEASE_SECONDS
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Hold the lease ``train:<group>``; yields a progress callback that renews it now and then.

    Raises ``AuroraError`` when another trainer holds it or learning is switched off, and from the
    callback when either happens later. A store that is away for less than the lease lasts does not
    matter.
    """
    name = training_lease_name(group_id)
    holder = name_of_this_process()
    token = _acquire(engine, group_id, name, holder, seconds)
    renewed = looked = time.monotonic()

    def renew(_: dict[str, Any]) -> None:
        nonlocal renewed, looked
        now = time.monotonic()
        if now - looked < LOOK_SECONDS:
            return
        looked = now
        due = now - renewed >= seconds / 10
        try:
            with store.session(engine, write=due) as s:
                if not queries.switches.is_on(s, group_id, LEARNING):
                    raise AuroraError(LEARNING_WENT_OFF)
                if due and not queries.leases.renew_lease(s, name, holder, token, seconds):
                    raise AuroraError(
                        "the training lease was lost to another trainer; this run stops"
                    )
        except Exception as error:
            if not is_away(error) or now - renewed > seconds:
                raise
            log.warning("the store is away, training goes on: %s", in_words(error))
            return
        if due:
            renewed = now

    try:
        yield renew
    finally:
        try:
            with store.session(engine) as s:
                queries.leases.release_lease(s, name, holder, token)
        except Exception as error:
            if not is_away(error):  # else it expires
                raise
