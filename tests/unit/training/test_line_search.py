"""How far a run goes from the live drafter towards the trained one, and how fast it may go."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aurora_sgl.evaluation.replay import RequestReplay
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.training.line_search import (
    ALPHAS,
    FLOOR,
    Way,
    believed_ratios,
    choose,
    interpolate,
    search,
)
from aurora_sgl.training.maturity import MATURE_TOKENS, YOUNG_TOKENS, by_maturity, peak_rate
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from tests.support.drafter_cases import RECIPE, good_drafter, requests
from tests.unit.training.test_trainer import world

SETTINGS = TrainSettings(**RECIPE)


def ways(*found: tuple[float, float, float]) -> list[Way]:
    return [Way(alpha, math.nan, *believed) for alpha, *believed in found]


@pytest.mark.parametrize(
    ("tried", "alpha"),
    [
        (ways((1.0, 2.0, 1.0), (0.75, 1.9, 1.0), (0.5, 1.8, 1.0), (0.25, 1.7, 1.0)), 1.0),
        (ways((1.0, 2.0, 0.92), (0.75, 1.9, 0.96), (0.5, 1.8, 0.985), (0.25, 1.7, 0.99)), 0.5),
        (ways((0.5, 1.8, 1.0), (0.75, 1.9, 1.0), (1.0, 1.9, 1.0)), 1.0),
        (ways((1.0, 1.7, 1 - FLOOR), (0.75, 1.9, 0.99), (0.5, 1.8, 1.0)), 0.75),
        (ways((1.0, 2.0, 0.90), (0.75, 1.9, 0.92), (0.5, 1.8, 0.94), (0.25, 1.7, 0.97)), 0.25),
    ],
)
def test_the_largest_gain_that_keeps_the_floor_of_every_domain(
    tried: list[Way], alpha: float
) -> None:
    assert choose(tried).alpha == alpha


DOMAINS = {"old a": 0.0, "old b": 0.0, "old c": 0.0, "new": 0.12}


def chosen(
    gains: dict[str, float],
    random: np.random.Generator,
    each: int = 8,
    traffic: dict[str, float] | None = None,
) -> float:
    """What is chosen on ``each`` dev requests a domain whose accept lengths change so at the whole
    way, and by part of it on a part. A request's own change has a spread of 6%."""
    before = [
        RequestReplay(n, 40, 40, domain, conversation=f"{n}")
        for n, domain in enumerate(each * list(gains))
    ]
    own = random.normal(0, 0.06, len(before))
    tried = []
    for alpha in ALPHAS:
        after = []
        for row, deviation in zip(before, own, strict=True):
            steps = 40 / (1 + alpha * (gains[row.domain] + deviation))
            after.append(replace(row, verify_steps=steps, accepted=80 - steps))
        length = AcceptCounts.of(after).accept_length
        tried.append(Way(alpha, length, *believed_ratios(before, after, traffic)))
    return choose(tried).alpha


def test_chance_in_small_domains_does_not_stop_what_harms_none() -> None:
    random = np.random.default_rng(0)
    alphas = [chosen(DOMAINS, random) for _ in range(60)]
    assert np.mean(np.array(alphas) == 1.0) > 0.6, np.unique(alphas, return_counts=True)


@pytest.mark.parametrize(("loss", "most"), [(0.06, 0.15), (0.10, 0.05), (0.20, 0.0)])
def test_a_small_domain_that_loses_much_stops_it(loss: float, most: float) -> None:
    random = np.random.default_rng(1)
    gains = {**DOMAINS, "old b": -loss}
    alphas = np.array([chosen(gains, random) for _ in range(60)])
    assert np.mean(alphas == 1.0) <= most, np.unique(alphas, return_counts=True)


def test_what_traffic_has_turned_to_decides_how_far_to_go() -> None:
    """Not what the dev split still has most of, as long as that keeps its floor."""
    gains = {"old a": -0.012, "old b": -0.012, "old c": -0.012, "new": 0.08}
    far = {
        name: np.mean([chosen(gains, np.random.default_rng(n), traffic=traffic) for n in range(40)])
        for name, traffic in (
            ("turned", {"new": 190.0, "old a": 10.0}),
            ("not turned", {"old a": 50.0, "old b": 50.0, "old c": 50.0}),
            ("unknown", {"another": 200.0}),
        )
    }
    assert far["turned"] > 0.65 and far["not turned"] < 0.45, far
    assert far["not turned"] < far["unknown"] < far["turned"], "as all domains do on the mean"


def test_the_way_begins_at_the_live_drafter_and_ends_at_the_trained_one(tmp_path: Path) -> None:
    live, _ = world(tmp_path)
    trained = noisy(live, 0.1)
    for alpha, end in ((0.0, live), (1.0, trained)):
        found = interpolate(live, trained, alpha).state_dict()
        assert all(torch.allclose(found[name], value) for name, value in end.state_dict().items())
    half = interpolate(live, trained, 0.5)
    name, value = next(iter(half.named_parameters()))
    middle = (live.get_parameter(name) + trained.get_parameter(name)) / 2
    assert torch.allclose(value, middle, atol=1e-6)


def test_a_run_that_learnt_goes_the_whole_way_and_one_that_broke_its_drafter_hardly_moves(
    tmp_path: Path,
) -> None:
    untrained, head = world(tmp_path)
    data = requests(head, 40)
    good = good_drafter()
    dev = [replace(one, domain="ab"[one.request_id % 2]) for one in data[30:]]
    found = search(untrained, untrained, good, dev, head, SETTINGS)
    assert found.alpha == 1.0 and found.drafter is good
    assert found.tried[1].accept_length > 1.05 * found.tried[0].accept_length
    assert found.tried[1].ratio > 1.05 > found.tried[0].ratio == 1.0
    broken = search(good, good, noisy(good, 1.0), dev, head, SETTINGS)
    assert broken.alpha < 1.0
    assert [way.alpha for way in broken.tried] == [0.0, *ALPHAS]
    lost = {way.alpha: way.worst for way in broken.tried}
    assert lost[broken.alpha] > lost[1.0]


def test_a_domain_that_loses_keeps_a_run_from_going_the_whole_way(tmp_path: Path) -> None:
    """Half of the requests go on as they did, the others were never seen: what is learnt of these
    must not cost those more than the floor."""
    _, head = world(tmp_path)
    old, new = requests(head, 40), requests(head, 40, seed=5)
    live = good_drafter()
    trained = train(noisy(live, 0.3), new[:30], head, SETTINGS).drafter
    dev = [replace(each, domain="old") for each in old[30:]]
    dev += [replace(each, domain="new") for each in new[30:]]
    found = search(live, live, trained, dev, head, SETTINGS)
    kept = {way.alpha: way.worst for way in found.tried}
    best = max(kept[alpha] for alpha in kept if alpha)
    assert kept[found.alpha] >= 1 - FLOOR or kept[found.alpha] == best


def test_too_few_dev_requests_take_the_whole_way(tmp_path: Path) -> None:
    live, head = world(tmp_path)
    trained = noisy(live, 0.1)
    found = search(live, live, trained, requests(head, 3), head, SETTINGS)
    assert (found.alpha, found.requests, found.tried) == (1.0, 3, ())
    assert found.drafter is trained


def test_dev_requests_without_a_determined_step_leave_no_number_that_json_lacks(
    tmp_path: Path,
) -> None:
    live, head = world(tmp_path)
    short = [replace(one, tokens=one.tokens[: one.output_start + 2]) for one in requests(head, 5)]
    found = search(live, live, noisy(live, 0.1), short, head, SETTINGS)
    assert found.alpha == 1.0
    assert json.loads(json.dumps(found.metrics, allow_nan=False))["dev_requests"] == 5


def noisy(drafter, scale: float):  # type: ignore[no-untyped-def]
    found = copy.deepcopy(drafter)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in found.parameters():
            value += scale * value.std() * torch.randn(value.shape, generator=generator)
    return found


def test_the_peak_rate_goes_from_young_to_mature_and_never_up() -> None:
    settings = TrainSettings()
    tokens = [0.0, 1e4, YOUNG_TOKENS, 2e5, 5e5, MATURE_TOKENS, 1e9, math.inf]
    rates = [peak_rate(settings, each) for each in tokens]
    assert rates[:3] == [settings.learning_rate] * 3
    assert rates[5:] == [settings.mature_learning_rate] * 3
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 4
    one_rate = TrainSettings(learning_rate=1e-4)
    assert {peak_rate(one_rate, each) for each in tokens} == {1e-4}


def test_a_run_from_a_young_base_has_a_least_number_of_updates_of_its_own() -> None:
    settings = TrainSettings()
    young = [by_maturity(settings, each) for each in (0, YOUNG_TOKENS)]
    assert [one.least_updates for one in young] == 2 * [settings.young_updates] == [200, 200]
    old = by_maturity(settings, YOUNG_TOKENS + 1)
    assert (old.least_updates, old.learning_rate) == (0, peak_rate(settings, YOUNG_TOKENS + 1))
    more = TrainSettings(least_updates=300)
    assert by_maturity(more, 0).least_updates == 300 == by_maturity(more, 1e9).least_updates
    assert by_maturity(TrainSettings(young_updates=0), 0).least_updates == 0


def test_a_mature_base_is_reminded_of_older_traffic_by_a_larger_share() -> None:
    settings = TrainSettings()
    tokens = [0, YOUNG_TOKENS, (YOUNG_TOKENS * MATURE_TOKENS) ** 0.5, MATURE_TOKENS, math.inf]
    shares = [by_maturity(settings, each).replay_share for each in tokens]
    assert shares == pytest.approx([0.25, 0.25, 0.375, 0.5, 0.5])
    for share in (0.0, 0.7):  # none is none, and what is more stays
        given = TrainSettings(replay_share=share)
        assert by_maturity(given, math.inf).replay_share == share
