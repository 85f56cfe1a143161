"""The bandit over recipes: what past runs earned decides, within bounds."""

import logging
import math

import numpy as np
import pytest

from aurora_sgl.training import recipe_bandit
from aurora_sgl.training.recipe_bandit import ARMS, FIELDS, RunReward, choose, past_rewards
from aurora_sgl.training.settings import TrainSettings

RECIPE = TrainSettings(explore=0.25)


def play(effects: dict[tuple[str, str], float], runs: int, seed: int) -> list[dict[str, str]]:
    """Arms of each run where an arm adds so many percent, beside the noise of a replay."""
    rng = np.random.default_rng(seed)
    rewards: list[RunReward] = []
    taken = []
    for number in range(runs):
        arms = choose(RECIPE, rewards, seed=[seed, number]).arms
        gain = 3.0 + sum(effects.get(arm, 0.0) for arm in arms.items()) + rng.normal(0, 1.5)
        rewards.append(RunReward(arms, gain))
        taken.append(arms)
    return taken


def test_without_past_runs_the_recipe_is_taken_as_given() -> None:
    choices = [choose(RECIPE, [], seed=seed) for seed in range(40)]
    plain = [one for one in choices if not one.explored]
    assert plain and all(one.settings == RECIPE and not one.arms for one in plain)


def test_exploring_turns_one_knob_by_one_level_in_the_share_that_was_given() -> None:
    choices = [choose(RECIPE, [], seed=seed) for seed in range(400)]
    explored = [one for one in choices if one.explored]
    assert 0.18 < len(explored) / len(choices) < 0.32
    assert all(len(one.arms) == 1 for one in explored)
    assert {arm for one in explored for arm in one.arms.items()} == set(ARMS)


def test_an_arm_that_earns_more_becomes_the_rule() -> None:
    better = {("rate", "half"): 2.0}
    late = [arms for seed in range(10) for arms in play(better, 80, seed)[50:]]
    assert sum(arms.get("rate") == "half" for arms in late) > 0.7 * len(late)


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_that_earns_less_is_only_tried(arm: tuple[str, str]) -> None:
    taken = [arms for seed in range(5) for arms in play({arm: -3.0}, 80, seed)]
    assert sum(arms.get(arm[0]) == arm[1] for arms in taken) < 0.1 * len(taken)


def test_equal_arms_leave_most_runs_to_the_recipe() -> None:
    taken = [arms for seed in range(5) for arms in play({}, 80, seed)]
    turned = sum(len(arms) for arms in taken) / len(taken)
    assert turned < 1.5  # of five knobs


def test_what_was_good_once_is_forgotten_when_it_turns_bad() -> None:
    good = [RunReward({"passes": "double"}, 6.0), RunReward({}, 2.0)] * 15
    bad = [RunReward({"passes": "double"}, 0.0), RunReward({}, 2.0)] * 25
    plain = TrainSettings(explore=1e-9)
    assert choose(plain, good, seed=0).arms == {"passes": "double"}
    assert choose(plain, [*good, *bad], seed=0).arms == {}


@pytest.mark.parametrize("knob", FIELDS)
def test_a_knob_that_the_recipe_names_stays(knob: str) -> None:
    default = TrainSettings()
    fixed = {name: getattr(default, name) for name in FIELDS[knob]}
    recipe = TrainSettings(explore=1.0, **fixed)
    rewards = [RunReward({k: level}, 50.0) for k, level in ARMS] + [RunReward({}, 0.0)] * 5
    for seed in range(20):
        assert knob not in choose(recipe, rewards, seed=seed).arms


def test_without_exploring_nothing_is_chosen() -> None:
    rewards = [RunReward({"passes": "double"}, 50.0), RunReward({}, 0.0)] * 5
    recipe = TrainSettings()
    assert choose(recipe, rewards, seed=0).settings is recipe


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_gives_a_recipe_that_the_settings_accept(arm: tuple[str, str]) -> None:
    changed = RECIPE.model_copy(update=ARMS[arm](RECIPE))
    assert TrainSettings.model_validate(changed.model_dump()) == changed
    assert changed != RECIPE
    assert {name for name in ARMS[arm](RECIPE)} <= set(FIELDS[arm[0]])


@pytest.mark.parametrize(
    "odd",
    [
        {"arms": {}, "reward": math.nan},
        {"arms": {}, "reward": math.inf},
        {"arms": {}, "reward": "much"},
        {"arms": {"rate": "tenfold"}, "reward": 1.0},
        {"arms": {"shape": "half"}, "reward": 1.0},
        {"arms": ["rate"], "reward": 1.0},
        {"arms": None, "reward": 1.0},
    ],
)
def test_runs_that_say_nothing_usable_are_left_out_with_one_line(
    odd: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    whole = {"arms": {"rate": "half"}, "reward": 1.5}
    assert past_rewards([odd, whole]) == [RunReward({"rate": "half"}, 1.5)]
    assert caplog.text.count("\n") == 1


def test_runs_of_a_time_before_rewards_are_no_oddity(caplog: pytest.LogCaptureFixture) -> None:
    assert past_rewards([{}, {"alpha": 0.5}, {"arms": {}, "gain": None}]) == []
    assert not caplog.text


def test_the_reward_is_the_gain_less_what_the_time_costs() -> None:
    gain, reward = recipe_bandit.reward_of(2.0, 2.2, 1800.0, TrainSettings(training_cost=2.0)) or (
        0.0,
        0.0,
    )
    assert gain == pytest.approx(9.531, abs=1e-3)
    assert reward == pytest.approx(gain - 1.0)


@pytest.mark.parametrize(("before", "after"), [(math.nan, 2.0), (2.0, math.nan), (0.0, 1.0)])
def test_without_a_replay_there_is_no_reward(before: float, after: float) -> None:
    assert recipe_bandit.reward_of(before, after, 10.0, RECIPE) is None
