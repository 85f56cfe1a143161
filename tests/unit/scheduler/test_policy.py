"""When to train, at what pace, and what counts as drift."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from aurora_sgl.config import SchedulerSettings
from aurora_sgl.scheduler.drift import DriftDetector, Fall, was_told
from aurora_sgl.scheduler.elapsed import Elapsed
from aurora_sgl.scheduler.load import load_of
from aurora_sgl.scheduler.policy import Facts, decide
from aurora_sgl.store.models import Drift, Server
from aurora_sgl.store.queries.request_counts import RequestCounts

RULES = SchedulerSettings(minutes=60, requests=200, min_new_requests=8, cooldown_minutes=5)
QUIET = Facts(
    learning=True, live_id=1, new_requests=50, since_run=1800, since_success=1800,
    since_rollback=None,
)  # fmt: skip
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("change", "trigger"),
    [
        ({}, ""),
        ({"new_requests": 200}, "requests"),
        ({"since_success": 3600}, "period"),
        ({"drift": "code: 2.0 -> 1.5"}, "drift"),
        ({"drift": "x", "new_requests": 300, "since_success": 9999}, "drift"),
        ({"new_requests": 7, "since_success": 9999, "drift": "x"}, ""),
        ({"new_requests": 999, "learning": False}, ""),
        ({"new_requests": 999, "live_id": None}, ""),
        ({"new_requests": 999, "since_run": 299}, ""),
        ({"new_requests": 999, "since_rollback": 10}, ""),
        ({"new_requests": 999, "since_run": None, "since_rollback": 301}, "requests"),
    ],
)
def test_whichever_trigger_comes_first_starts_a_run_and_nothing_else_does(
    change: dict[str, object], trigger: str
) -> None:
    assert decide(replace(QUIET, **change), RULES).trigger == trigger  # type: ignore[arg-type]


def test_a_trigger_that_is_set_to_zero_never_fires() -> None:
    busy = replace(QUIET, new_requests=10_000, since_success=1e6, drift="x")
    off = RULES.model_copy(update={"minutes": 0, "requests": 0, "drift": False})
    found = decide(busy, off)
    assert found.trigger == "" and "every trigger is off" in found.next_action


def test_a_decision_says_what_comes_next_and_when() -> None:
    waiting = decide(QUIET, RULES)
    assert (waiting.state, waiting.next_in) == ("waiting", 1800)
    assert "at 200 new requests" in waiting.next_action and "60 minutes" in waiting.next_action
    resting = decide(replace(QUIET, since_run=100, since_rollback=40), RULES)
    assert (resting.state, resting.next_in) == ("cooldown", 260)
    assert resting.reason == "rest after a rollback"
    assert decide(replace(QUIET, learning=False), RULES).state == "off"


def test_a_moment_in_the_future_counts_from_when_it_was_first_met() -> None:
    clock = {"now": NOW, "steady": 100.0}
    elapsed = Elapsed(lambda: clock["now"], lambda: clock["steady"])
    past = NOW - timedelta(seconds=30)
    assert elapsed.since(past) == 30
    clock["now"] = NOW - timedelta(hours=3)  # set back
    assert elapsed.since(past) == 0
    clock["steady"] += 45
    clock["now"] += timedelta(seconds=45)
    assert elapsed.since(past) == 45
    assert elapsed.on_this_clock(past) == NOW - timedelta(hours=3)
    assert elapsed.since(clock["now"] + timedelta(seconds=2)) == 0, "machines differ by a little"


def server(queue: float = 0, step_ms: float = 20, running: float = 1, silent: float = 0) -> Server:
    return Server(
        name="s:1",
        counters={"queue": queue, "step_ms": step_ms, "running_requests": running},
        last_seen_at=NOW - timedelta(seconds=silent),
    )


@pytest.mark.parametrize(
    ("servers", "pace"),
    [
        ([], "full"),
        ([server()], "full"),
        ([server(queue=1)], "half"),
        ([server(queue=1), server(queue=4)], "none"),
        ([server(queue=99, silent=60)], "full"),  # it says nothing any more
        ([server(step_ms=80)], "none"),
        ([server(step_ms=80, running=0)], "full"),  # of steps long ago
    ],
)
def test_training_steps_aside_for_servers_with_a_queue_or_slow_steps(
    servers: list[Server], pace: str
) -> None:
    rules = SchedulerSettings(pause_queue=4, slow_queue=1, pause_step_ms=50)
    found = load_of(servers, rules, Elapsed(lambda: NOW))
    assert found.pace == pace and bool(found.reason) == (pace != "full")


def requests(
    seed: int, *parts: tuple[int, float], domain: str = "chat", rule: str = "greedy"
) -> list[RequestCounts]:
    """Requests that differ as served ones do, (count, mean of accepted tokens) after another."""
    rng = np.random.default_rng(seed)
    found = []
    for count, mean in parts:
        for _ in range(count):
            steps = max(2, int(rng.gamma(2, 15)))
            share = rng.beta(2 * mean, 2 * (3 - mean))
            accepted = int(rng.binomial(3 * steps, share))
            at = NOW + timedelta(seconds=len(found))
            found.append(RequestCounts(len(found), domain, 3, 4, 8, steps, accepted, at, rule))
    return found


def detector() -> DriftDetector:
    rules = SchedulerSettings()
    return DriftDetector(rules.drift_threshold, rules.drift_slack)


def test_a_fall_of_the_accept_length_is_seen_with_its_evidence() -> None:
    (fall,) = detector().feed(requests(1, (200, 1.0), (80, 0.5)))[:1]
    assert 200 < fall.last_request_id < 270
    assert fall.accept_length_before == pytest.approx(2.0, abs=0.1)
    assert fall.accept_length_after == pytest.approx(1.5, abs=0.15)
    assert abs(fall.requests_before - 200) < 15
    assert fall.details["detector"] == "river.drift.PageHinkley"


def stored(fall: Fall) -> Drift:
    return Drift(domain=fall.domain, last_request_id=fall.last_request_id, details=fall.details)


def test_a_stored_fall_is_known_to_who_reads_from_elsewhere_and_a_later_one_is_not() -> None:
    served = requests(1, (200, 1.4), (120, 0.9), (120, 0.3))
    first, *_, last = detector().feed(served)
    again = detector().feed(served[60:])[0]
    assert was_told(again, [stored(first)])
    assert not was_told(last, [stored(first)])
    elsewhere = stored(first)
    elsewhere.domain = "other"
    assert not was_told(again, [elsewhere])


def test_neither_noise_nor_a_rise_is_a_fall() -> None:
    alarms = sum(bool(detector().feed(requests(seed, (600, 1.0)))) for seed in range(40))
    assert alarms <= 3
    assert detector().feed(requests(0, (200, 0.6), (200, 1.2))) == []


def test_a_turn_from_greedy_to_sampled_requests_is_no_fall_and_a_fall_of_the_sampled_is() -> None:
    greedy, sampled = requests(4, (150, 1.2)), requests(5, (200, 0.7), (100, 0.3), rule="sampled")
    watching = detector()
    assert watching.feed([*greedy, *sampled[:200]]) == []
    (fall, *_) = watching.feed(sampled[200:])
    assert fall.details["accept_rule"] == "sampled"
    old = stored(fall)  # of a release that did not tell rules apart
    old.details = {name: value for name, value in fall.details.items() if name != "accept_rule"}
    other = stored(fall)
    other.details = {**fall.details, "accept_rule": "greedy"}
    assert was_told(fall, [old]) and not was_told(fall, [other])


def test_a_fall_in_one_domain_is_seen_among_others_and_told_once() -> None:
    falling = requests(2, (100, 1.2), (120, 0.4), domain="code")
    steady = requests(3, (220, 1.0))
    mixed = [one for pair in zip(falling, steady, strict=True) for one in pair]
    assert [fall.domain for fall in detector().feed(mixed)] == ["code"]
