"""What drafts saved, and what training them cost: arithmetic only, from sums of the store.

A step with drafts of b requests takes t_draft(b), and each of them keeps some tokens of it. Without
drafts every token is a step of its own, which takes t_plain(b). b requests share a step, so to one
of them it is 1 / b of its time. Summed over the steps with drafts of all requests:

    seconds saved = sum of (tokens kept * t_plain(b) - steps * t_draft(b)) / b

Both times are what the server itself measured at that load and in that shape; where it did not,
the steps are counted and nothing is claimed of their time. The store knows b as one of a group (1,
2, 3 to 4, 5 to 8, ...), so what was saved is a range where b is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from functools import reduce
from operator import add

from sqlalchemy.orm import Session

from aurora_sgl.config import Settings
from aurora_sgl.step_cost import ShapeTimes
from aurora_sgl.store import queries
from aurora_sgl.store.queries.drafted_steps import DraftedSteps
from aurora_sgl.store.queries.runs import RunSpan

HOUR = 3600.0
#: The formula for people, a line a sum.
FORMULA = (
    "steps saved = tokens kept of steps with drafts - those steps",
    "seconds saved = sum of (tokens kept x t_plain(b) - steps x t_draft(b)) / b",
    "seconds of training = duration of a run x its processes",
    "money = hours saved x AURORA_PRICE_SERVER_HOUR",
    "      - hours of training x AURORA_PRICE_TRAINING_HOUR",
)
#: What the names in it mean, and what it leaves out.
MEANING = (
    "b is how many requests ran at once: they share each step. It is known as one of a group (1, "
    "2, 3 to 4, 5 to 8, ...), so a sum over larger groups is a range. t_plain and t_draft are what "
    "a step without drafts and one with drafts of the same shape take at that load, as the server "
    "measured them last. Where it did not, the steps are left out of the seconds and counted as "
    "not measured. Steps that lost time count as losses. Runs that failed count, and so does the "
    "judging at the end of a run."
)


@dataclass(frozen=True)
class Day:
    """A day of somebody's calendar; its ends in UTC, 23 to 25 hours apart where clocks turn."""

    day: date
    begin: datetime
    end: datetime


def days(last: date, count: int, zone: tzinfo) -> list[Day]:
    """So many days of a zone up to this one, oldest first."""
    every = [last - timedelta(days=back) for back in range(count, -2, -1)]
    # Where a day begins at no midnight, the clock of the day before gives the moment.
    begins = [datetime.combine(day, time(), zone).astimezone(UTC) for day in every]
    return [
        Day(day, *ends) for day, *ends in zip(every[1:-1], begins[1:-1], begins[2:], strict=True)
    ]


@dataclass(frozen=True)
class Saved:
    """By steps with drafts. ``low`` and ``high``: server seconds, of the timed steps."""

    steps: int = 0
    tokens: int = 0  # kept
    timed_steps: int = 0
    low: float = 0.0
    high: float = 0.0

    @property
    def steps_saved(self) -> int:
        """Steps that these tokens would have taken more without drafts."""
        return self.tokens - self.steps

    @property
    def seconds(self) -> tuple[float, float] | None:
        """``None``: no step's time is known, or there was none."""
        return (self.low, self.high) if self.timed_steps else None

    def __add__(self, other: Saved) -> Saved:
        return Saved(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.timed_steps + other.timed_steps,
            self.low + other.low,
            self.high + other.high,
        )


@dataclass(frozen=True)
class Trained:
    """What training took: seconds of processes, and the runs that began."""

    seconds: float = 0.0
    runs: int = 0

    def __add__(self, other: Trained) -> Trained:
        return Trained(self.seconds + other.seconds, self.runs + other.runs)


@dataclass(frozen=True)
class Prices:
    """Of an hour; ``None``: nobody told."""

    server_hour: float | None = None
    training_hour: float | None = None
    currency: str = ""

    @classmethod
    def of(cls, settings: Settings) -> Prices:
        return cls(
            settings.price_server_hour, settings.price_training_hour, settings.price_currency
        )

    @property
    def missing(self) -> list[str]:
        """Settings without which no sum of money can be told."""
        prices = {
            "AURORA_PRICE_SERVER_HOUR": self.server_hour,
            "AURORA_PRICE_TRAINING_HOUR": self.training_hour,
        }
        return [name for name, price in prices.items() if price is None]

    def saved(self, saved: Saved) -> tuple[float, float] | None:
        if self.server_hour is None or saved.seconds is None:
            return None
        low, high = saved.seconds
        return low / HOUR * self.server_hour, high / HOUR * self.server_hour

    def spent(self, trained: Trained) -> float | None:
        return None if self.training_hour is None else trained.seconds / HOUR * self.training_hour

    def net(self, saved: Saved, trained: Trained) -> tuple[float, float] | None:
        """What was saved less what was spent; ``None``: one of them is not known."""
        gained, spent = self.saved(saved), self.spent(trained)
        if gained is None or spent is None:
            return None
        return gained[0] - spent, gained[1] - spent


@dataclass(frozen=True)
class Worth:
    """Sums over days. Training is not of one domain, so it stands in no row of them."""

    by_day: Sequence[tuple[Day, Saved, Trained]]  # oldest first
    by_domain: Mapping[str, Saved] = field(default_factory=dict)  # the largest in steps first

    @property
    def saved(self) -> Saved:
        return total(saved for _, saved, _ in self.by_day)

    @property
    def trained(self) -> Trained:
        return reduce(add, (trained for _, _, trained in self.by_day), Trained())


def total(parts: Iterable[Saved]) -> Saved:
    return reduce(add, parts, Saved())


def saved_by(row: DraftedSteps, times: ShapeTimes | None) -> Saved:
    """What the steps of one row saved, by the times of the server that made them."""
    untimed = Saved(row.steps, row.tokens)
    if times is None:
        return untimed
    plain = times.plain_ms(row.batch_bucket)
    drafts = times.drafts_ms(row.batch_bucket, row.depth, row.nodes)
    if plain is None or drafts is None:
        return untimed
    seconds = (row.tokens * plain - row.steps * drafts) / 1000
    fewest = row.batch_bucket // 2 + 1  # requests at once, of the group
    shares = seconds / row.batch_bucket, seconds / fewest
    return Saved(row.steps, row.tokens, row.steps, min(shares), max(shares))


def trained_in(day: Day, runs: Iterable[RunSpan], now: datetime) -> Trained:
    """What runs took within a day: one over midnight is of both, and counts where it began."""
    seconds, begun = 0.0, 0
    for run in runs:
        end = min(run.finished_at or now, day.end)
        seconds += max(0.0, (end - max(run.started_at, day.begin)).total_seconds()) * run.workers
        begun += day.begin <= run.started_at < day.end
    return Trained(seconds, begun)


def worth_of(
    steps: Sequence[tuple[Day, Sequence[DraftedSteps]]],
    times: Mapping[int, ShapeTimes],
    runs: Sequence[RunSpan],
    now: datetime,
) -> Worth:
    """``steps``: those of each day; ``times``: by the id of a server's boot."""
    by_day, by_domain = [], dict[str, Saved]()
    for day, rows in steps:
        parts = [(row.domain, saved_by(row, times.get(row.server_id))) for row in rows]
        for domain, part in parts:
            by_domain[domain] = by_domain.get(domain, Saved()) + part
        by_day.append((day, total(part for _, part in parts), trained_in(day, runs, now)))
    ordered = sorted(by_domain.items(), key=lambda item: (-item[1].steps, item[0]))
    return Worth(by_day, dict(ordered))


def read(s: Session, group_id: int, wanted: Sequence[Day], now: datetime) -> Worth:
    """Of a group in these days, from its roll-ups."""
    steps = [
        (day, queries.drafted_steps.drafted_steps(s, group_id, day.begin, day.end))
        for day in wanted
    ]
    times = queries.step_times.shape_times(s, group_id)
    runs = queries.runs.run_spans(s, group_id, wanted[0].begin, wanted[-1].end)
    return worth_of(steps, times, runs, now)


def ranged(ends: tuple[float, float] | None, digits: int = 1) -> str:
    """``12.3``, or ``12.3 to 15.1`` where its ends differ as they are written; "" for none."""
    if ends is None:
        return ""
    low, high = (f"{value:,.{digits}f}" for value in ends)
    return low if low == high else f"{low} to {high}"
