"""Which of the store's requests a run looks at: its window, older traffic, and held-out ones."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.store import queries
from aurora_sgl.store.queries import RecentRequest
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.splits import split_key, split_of

REACH = 5000  # newest requests with a trace that a run knows of
HELD_OUT = 200  # newest held-out requests that a run replays


@dataclass(frozen=True)
class Selection:
    """Requests of a run, newest first in each list; no request is in two of them."""

    window: list[RecentRequest]  # to learn from
    replay: list[RecentRequest]  # older, or of other domains, against forgetting
    held_out: list[RecentRequest]  # of conversations that no run ever trains on
    known: list[RecentRequest]  # all that may fill a cached prefix, the others among them

    @property
    def span(self) -> tuple[datetime, datetime] | None:
        """When the first and the last request of the window finished."""
        times = [row.finished_at for row in self.window]
        return (min(times), max(times)) if times else None


def select(
    s: Session, group_id: int, settings: TrainSettings, now: datetime | None = None
) -> Selection:
    """The newest requests that may be learned from, by number, age and domain."""
    known = queries.recent_requests(s, group_id, limit=REACH)
    wanted = [row for row in known if not settings.domains or row.domain in settings.domains]
    if settings.window_hours:
        since = (now or utc_now()) - timedelta(hours=settings.window_hours)
        wanted = [row for row in wanted if row.finished_at >= since]

    def is_held_out(row: RecentRequest) -> bool:
        shares = {"dev_share": settings.dev_share, "gate_share": settings.gate_share}
        return split_of(split_key(row), **shares) == "gate"

    window = [row for row in wanted[: settings.window] if not is_held_out(row)]
    held_out = [row for row in wanted if is_held_out(row)][:HELD_OUT]
    taken = {row.request_id for row in wanted[: settings.window]}
    rest = [row for row in known if row.request_id not in taken and not is_held_out(row)]
    return Selection(window, _draw(rest, len(window), settings), held_out, known)


def _draw(rows: list[RecentRequest], window: int, settings: TrainSettings) -> list[RecentRequest]:
    """As many as make up the replay share; which ones depends on the seed and their ids alone."""
    count = round(window * settings.replay_share / (1 - settings.replay_share))

    def place(row: RecentRequest) -> str:
        return sha256_bytes(f"replay:{settings.seed}:{row.request_id}".encode())

    drawn = {row.request_id for row in sorted(rows, key=place)[:count]}
    return [row for row in rows if row.request_id in drawn]
