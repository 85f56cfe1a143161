"""Who is there: the names of leases, and after how long a silence somebody counts as gone.

Servers are heard of every two seconds, schedulers every five.
"""

from __future__ import annotations

import os
import socket
import uuid
from datetime import datetime, timedelta

#: Seconds after which what somebody said is no news: it is not acted on, and who waits for it is
#: not ready.
STALE_SECONDS = 15.0
#: Seconds without a word after which a server, a boot or a scheduler counts as gone.
SILENT_SECONDS = 30.0
#: The same where a promotion is rolled back for it.
LOST_SECONDS = 60.0
#: Seconds without a word, by the store's clock, after which a server's row says that it is gone.
GHOST_SECONDS = 300.0
#: Seconds for which whoever prunes a group holds its lease.
PRUNE_LEASE_SECONDS = 60.0
#: Seconds for which a training run holds its lease. Longer than any of the above, since a run that
#: is paused or whose store is away goes on afterwards.
TRAINING_LEASE_SECONDS = 300.0


def name_of_this_process() -> str:
    """host:pid:random, which no other process has."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def training_lease_name(group_id: int) -> str:
    return f"train:{group_id}"


def scheduler_lease_name(group_id: int) -> str:
    return f"scheduler:{group_id}"


def prune_lease_name(group_id: int) -> str:
    return f"prune:{group_id}"


def is_silent(last_seen_at: datetime, now: datetime, seconds: float = SILENT_SECONDS) -> bool:
    """Whether nothing was heard of somebody for longer than this."""
    return now - last_seen_at > timedelta(seconds=seconds)
