"""What drafts are worth, set against sums that are made step by step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import text

from aurora_sgl import store
from aurora_sgl.batch_sizes import batch_bucket
from aurora_sgl.rollout import worth
from aurora_sgl.rollout.worth import Day, Prices, Saved, Trained
from aurora_sgl.step_cost import ShapeTimes, step_key
from aurora_sgl.store.queries.drafted_steps import DraftedSteps
from aurora_sgl.store.queries.runs import RunSpan
from tests.support import dashboard_house as samples

DOMAINS = ("chat", "code", "sql")
SHAPES = ((1, 2), (3, 4), (3, 6))
NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


class ServerStep(NamedTuple):
    """One step of a server: what each of its requests kept of it, by domain."""

    shape: tuple[int, int]
    kept: list[tuple[str, int]]


def draw(rng: random.Random, most: int) -> list[ServerStep]:
    return [
        ServerStep(
            rng.choice(SHAPES),
            [(rng.choice(DOMAINS), rng.randrange(5)) for _ in range(rng.randint(1, most))],
        )
        for _ in range(60)
    ]


def rolled_up(steps: list[ServerStep]) -> list[DraftedSteps]:
    sums: dict[tuple[str, int, tuple[int, int]], list[int]] = {}
    for step in steps:
        for domain, kept in step.kept:
            of = sums.setdefault((domain, batch_bucket(len(step.kept)), step.shape), [0, 0])
            of[0] += 1
            of[1] += kept
    return [
        DraftedSteps(1, domain, group, *shape, count, tokens)
        for (domain, group, shape), (count, tokens) in sums.items()
    ]


def measured(rng: random.Random, groups: tuple[int, ...]) -> ShapeTimes:
    counters = {step_key(group, 0, 1): 10.0 + rng.random() for group in groups}
    counters |= {
        step_key(group, *shape): 12.0 + 10 * rng.random() for group in groups for shape in SHAPES
    }
    return ShapeTimes.of(counters)


def by_hand(steps: list[ServerStep], times: ShapeTimes) -> float:
    """Seconds: a step is paid once, and each token of each request a share of a plain one."""
    spent = saved = 0.0
    for step in steps:
        group = batch_bucket(len(step.kept))
        drafts, plain = times.drafts_ms(group, *step.shape), times.plain_ms(group)
        assert drafts is not None and plain is not None
        spent += drafts
        saved += sum(kept for _, kept in step.kept) * plain / len(step.kept)
    return (saved - spent) / 1000


def together(steps: list[ServerStep], times: ShapeTimes) -> Saved:
    return worth.total(worth.saved_by(row, times) for row in rolled_up(steps))


@pytest.mark.parametrize("seed", range(12))
def test_one_and_two_requests_at_once_are_summed_exactly(seed: int) -> None:
    rng = random.Random(seed)
    steps, times = draw(rng, 2), measured(rng, (1, 2))
    saved = together(steps, times)
    assert saved.low == pytest.approx(saved.high) == pytest.approx(by_hand(steps, times))
    kept = [tokens for step in steps for _, tokens in step.kept]
    assert saved.steps_saved == sum(kept) - len(kept)
    assert saved.timed_steps == saved.steps == len(kept)


@pytest.mark.parametrize("seed", range(12))
def test_more_at_once_are_a_range_that_holds_the_true_sum(seed: int) -> None:
    rng = random.Random(100 + seed)
    steps, times = draw(rng, 9), measured(rng, (1, 2, 4, 8, 16))
    saved = together(steps, times)
    assert saved.low - 1e-9 <= by_hand(steps, times) <= saved.high + 1e-9
    assert saved.low < saved.high


def test_drafts_that_lose_are_losses_and_what_was_not_timed_is_left_out() -> None:
    times = ShapeTimes.of({"step_ms_1_0_1": 20.0, "step_ms_1_3_4": 50.0, "step_ms_4_3_4": 26.0})
    lost = worth.saved_by(DraftedSteps(1, "chat", 1, 3, 4, 100, 150), times)
    assert lost.seconds == (pytest.approx(-2.0), pytest.approx(-2.0)) and lost.steps_saved == 50
    for row in (
        DraftedSteps(1, "chat", 4, 3, 4, 100, 150),  # no plain step there
        DraftedSteps(1, "chat", 1, 2, 3, 100, 150),  # another shape
        DraftedSteps(1, "chat", 1, 3, 0, 100, 150),  # not known which
    ):
        assert worth.saved_by(row, times) == Saved(100, 150)
    assert worth.saved_by(row, None).seconds is None
    both = lost + Saved(100, 150)
    assert (both.steps, both.timed_steps, both.seconds) == (200, 100, lost.seconds)


def test_a_range_says_at_least_also_where_drafts_lose() -> None:
    times = ShapeTimes.of({"step_ms_8_0_1": 20.0, "step_ms_8_3_4": 50.0})
    lost = worth.saved_by(DraftedSteps(1, "chat", 8, 3, 4, 100, 150), times)
    assert lost.seconds == (pytest.approx(-2.0 / 5), pytest.approx(-2.0 / 8))


def test_where_each_tree_is_chosen_its_size_does_not_matter() -> None:
    counters = {"step_ms_1_0_1": 20.0, "step_ms_1_3_6": 26.0, "tree_explored_1": 3.0}
    times = ShapeTimes.of(counters)
    assert times.drafts_ms(1, 2, 4) == 26.0 and times.drafts_ms(2, 2, 4) is None
    odd = {
        "step_ms": 3.0,
        "step_ms_plain": 9.0,
        "step_ms_1_0_x": 9.0,
        "step_ms_1_3_6": inf,
    }
    assert ShapeTimes.of(odd).by_shape == {}


@pytest.mark.parametrize("seed", range(5))
def test_days_and_domains_each_sum_to_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    days = worth.days(NOON.date(), 4, UTC)
    times = {1: measured(rng, (1, 2, 4))}  # of larger groups some are not timed
    steps = [(day, rolled_up(draw(rng, 6))) for day in days]
    answer = worth.worth_of(steps, times, [], NOON)
    of_domains = worth.total(answer.by_domain.values())
    whole = answer.saved
    assert (of_domains.steps, of_domains.tokens) == (whole.steps, whole.tokens)
    assert of_domains.timed_steps == whole.timed_steps < whole.steps
    assert of_domains.seconds == pytest.approx(whole.seconds)


@pytest.mark.parametrize(
    ("zone", "last", "hours"),
    [
        ("UTC", date(2026, 11, 30), [24, 24, 24]),
        ("Europe/Zurich", date(2026, 3, 30), [24, 23, 24]),
        ("Europe/Zurich", date(2026, 10, 26), [24, 25, 24]),
        ("Australia/Lord_Howe", date(2026, 4, 6), [24, 24.5, 24]),
        ("America/Santiago", date(2026, 9, 7), [24, 23, 24]),  # no midnight on the 6th
        ("Pacific/Apia", date(2011, 12, 31), [24, 0, 24]),  # no 30th
        ("Asia/Kathmandu", date(2027, 1, 1), [24, 24, 24]),
    ],
)
def test_days_follow_the_clock_of_a_zone_without_gap(
    zone: str, last: date, hours: list[float]
) -> None:
    days = worth.days(last, 3, ZoneInfo(zone))
    assert [day.day for day in days] == [last - timedelta(days=2 - i) for i in range(3)]
    assert [(day.end - day.begin) / timedelta(hours=1) for day in days] == hours
    assert all(one.end == next.begin for one, next in pairwise(days))
    local = days[0].begin.astimezone(ZoneInfo(zone))
    assert (local.hour, local.minute) in {(0, 0), (1, 0)}


def test_a_run_over_midnight_is_of_both_days_and_one_that_goes_on_counts_until_now() -> None:
    yesterday, today = worth.days(NOON.date(), 2, UTC)
    runs = [
        RunSpan(today.begin - timedelta(minutes=10), today.begin + timedelta(minutes=20), 2),
        RunSpan(NOON - timedelta(seconds=30), None, 1),
        RunSpan(yesterday.begin - timedelta(hours=3), yesterday.begin - timedelta(hours=2), 8),
    ]
    assert worth.trained_in(yesterday, runs, NOON) == Trained(1200.0, 1)
    assert worth.trained_in(today, runs, NOON) == Trained(2430.0, 1)


def test_money_is_told_where_both_prices_are() -> None:
    saved, trained = Saved(10, 20, 10, 1800.0, 3600.0), Trained(900.0, 1)
    prices = Prices(2.0, 4.0, "EUR")
    assert prices.saved(saved) == (1.0, 2.0) and prices.spent(trained) == 1.0
    assert prices.net(saved, trained) == (0.0, 1.0) and prices.missing == []
    half = Prices(server_hour=2.0)
    assert half.net(saved, trained) is None and half.missing == ["AURORA_PRICE_TRAINING_HOUR"]
    assert prices.net(Saved(10, 20), trained) is None  # not measured is not nothing
    assert Prices(0.0, 0.0).net(saved, trained) == (0.0, 0.0)


def test_ends_that_read_alike_are_written_once() -> None:
    assert worth.ranged((1.04, 1.01)) == "1.0" and worth.ranged(None) == ""
    assert worth.ranged((-1234.5, 3.0)) == "-1,234.5 to 3.0"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[samples.House]:
    house = samples.empty(tmp_path)
    samples.add_servers(house)
    yield house
    house.engine.dispose()


def test_the_store_gives_the_sums_of_its_single_steps(house: samples.House) -> None:
    rng = random.Random(3)
    with house.together():
        for index in range(40):
            house.serve(NOON - timedelta(minutes=50 * index), 0, boot=rng.choice([77, 78]),
                        domain=rng.choice(DOMAINS), steps=9, rng=rng)  # fmt: skip
    with house.engine.begin() as connection:
        connection.execute(text("UPDATE server SET counters = '{}' WHERE boot_id = 78"))
        events = connection.execute(text(
            "SELECT e.at, r.domain, s.boot_id, e.kept FROM acceptance_event e "
            "JOIN request r ON r.id = e.request_id JOIN server s ON s.id = r.server_id"
        )).all()  # fmt: skip
    days = worth.days(NOON.date(), 3, UTC)
    with store.session(house.engine, write=False) as s:
        answer = worth.read(s, house.group_id, days, NOON)
    for day, saved, _ in answer.by_day:
        assert _by_events(events, day, "") == pytest.approx(_numbers(saved))
    for domain, saved in answer.by_domain.items():
        assert _by_events(events, days[0], domain, days[-1].end) == pytest.approx(_numbers(saved))
    assert 0 < answer.saved.timed_steps < answer.saved.steps == len(events)


def _numbers(saved: Saved) -> list[float]:
    return [saved.steps, saved.steps_saved, saved.timed_steps, saved.low, saved.high]


def _by_events(events: object, day: Day, domain: str, end: datetime | None = None) -> list[float]:
    steps = more = timed = 0
    seconds = 0.0
    for at, of, boot, kept in events:  # type: ignore[attr-defined]
        moment = datetime.fromisoformat(at).replace(tzinfo=UTC)
        if day.begin <= moment < (end or day.end) and domain in ("", of):
            steps, more = steps + 1, more + kept - 1
            if boot == 77:  # one request at once: 20 ms against 26 ms
                timed, seconds = timed + 1, seconds + (20 * kept - 26) / 1000
    return [steps, more, timed, seconds, seconds]


def test_the_command_prints_losses_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    from aurora_sgl.cli import worth as command

    day = worth.days(NOON.date(), 1, UTC)[0]
    lost = Saved(100, 150, 60, -2.5, -1.0)
    answer = worth.Worth([(day, lost, Trained(90.0, 2))], {"chat": lost})
    command._print("default", answer, Prices(server_hour=2.0))
    printed = capsys.readouterr().out
    assert "50 steps saved; seconds saved: -2.5 to -1.0; 90 s of training in 2 runs" in printed
    assert "40 of 100 steps with drafts are not in the seconds" in printed
    assert "no money is shown: give AURORA_PRICE_TRAINING_HOUR" in printed
    assert all(line in printed for line in worth.FORMULA)
    whole = command._as_json("default", answer, Prices(3600.0, 3600.0))["total"]
    assert whole["money"] == (-92.5, -91.0) and whole["steps_not_measured"] == 40
