"""Which of the store's requests a run looks at: its window, older traffic, a dev split, and
held-out ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice

from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.sequences.held_out import REACH
from aurora_sgl.sequences.splits import split_key, split_of, why_not_judged
from aurora_sgl.store import queries
from aurora_sgl.store.queries.requests import RecentRequest
from aurora_sgl.training import reservoir
from aurora_sgl.training.settings import TrainSettings

HELD_OUT = 200  # newest held-out requests that a run replays, of those that can be judged


@dataclass(frozen=True)
class Selection:
    """Requests of a run, newest first in each list; no request is in two of them
    but for ``reservoir``, ``recent`` and ``open_to_all``."""

    window: list[RecentRequest]  # to learn from
    replay: list[RecentRequest]  # older, or of other domains, against forgetting
    reservoir: list[RecentRequest]  # what is kept of each domain from now on, others among them
    dev: list[RecentRequest]  # of conversations that are only trained on with another dev share
    held_out: list[RecentRequest]  # that can be judged, of conversations that no run trains on
    recent: list[RecentRequest]  # all that may fill a cached prefix, the others among them
    not_judged: Counter[str] = field(default_factory=Counter)  # held-out ones left out, by reason
    #: The newest of the other sides that can be judged. Those that came after all that any run has
    #: learnt from do judge, as held-out ones, until one learns from them.
    open_to_all: list[RecentRequest] = field(default_factory=list)

    @property
    def span(self) -> tuple[datetime, datetime] | None:
        """When the first and the last request of the window finished."""
        times = [row.finished_at for row in self.window]
        return (min(times), max(times)) if times else None


def select(
    s: Session, group_id: int, settings: TrainSettings, now: datetime | None = None
) -> Selection:
    """The newest requests that may be learned from, by number, age and domain, and what the
    reservoir has of older traffic."""
    newest = queries.requests.recent_requests(s, group_id, limit=REACH)
    recent = [*newest, *reservoir.held(s, group_id, besides=newest)]
    wanted = [row for row in newest if not settings.domains or row.domain in settings.domains]
    if settings.window_hours:
        since = (now or utc_now()) - timedelta(hours=settings.window_hours)
        wanted = [row for row in wanted if row.finished_at >= since]

    side = {
        row.request_id: split_of(
            split_key(row), dev_share=settings.dev_share, gate_share=settings.gate_share
        )
        for row in recent
    }
    window = [row for row in wanted[: settings.window] if side[row.request_id] == "train"]
    dev = [row for row in recent if side[row.request_id] == "dev" and not why_not_judged(row)]
    held_out, not_judged = [], Counter[str]()
    for row in wanted:
        if side[row.request_id] == "gate":
            if reason := why_not_judged(row):
                not_judged[reason] += 1
            else:
                held_out.append(row)
    taken = {row.request_id for row in wanted[: settings.window]}
    rest = [row for row in recent
            if row.request_id not in taken and side[row.request_id] == "train"]  # fmt: skip
    members = reservoir.sample(
        (row for row in recent if side[row.request_id] == "train"), settings.reservoir
    )
    open_to_all = (
        row for row in wanted if side[row.request_id] != "gate" and not why_not_judged(row)
    )
    return Selection(
        window,
        _draw(rest, len(window), settings),
        members,
        reservoir.in_turns(dev, settings.dev_requests),
        held_out,
        [*recent, *queries.requests.donors(s, recent)],
        not_judged,
        [*islice(open_to_all, HELD_OUT)],
    )


def _draw(rows: list[RecentRequest], window: int, settings: TrainSettings) -> list[RecentRequest]:
    """As many as make up the replay share, domains taking turns; which ones depends on the seed and
    their ids alone."""
    count = round(window * settings.replay_share / (1 - settings.replay_share))

    def place(row: RecentRequest) -> str:
        return sha256_bytes(f"replay:{settings.seed}:{row.request_id}".encode())

    drawn = {row.request_id for row in reservoir.in_turns(sorted(rows, key=place), count)}
    return [row for row in rows if row.request_id in drawn]
