"""Which recipe a run of the scheduler takes: a bandit over the runs of a group.

What suits a deployment - a gentler rate, more passes, more replay of old traffic, no line search, a
renewed draft vocabulary - depends on its traffic, and every run shows a little of it. An *arm* is
one knob turned one level away from the recipe as given (``ARMS``), never further: those are the
bounds. The reward of a run is the gain in accept length over its base by replay on held-out
requests, in percent, less what its time costs (``training_cost`` percent an hour). Gain per second
alone would always choose the shortest run: the first requests teach most.

The model is Bayesian linear regression on the arms that were taken, with a level that all runs
share, older runs counting less (``MEMORY``): a conjugate normal prior with a noise of its own scale
(Bishop, Pattern Recognition and Machine Learning, 3.3). Most runs take, of each knob, a level that
is better than the recipe's with a probability of ``SURE``; a share ``explore`` of them also takes
one further arm by Thompson sampling (Thompson, Biometrika 1933). What was chosen and what came of
it stands in ``training_run.metrics`` as ``arms``, ``explored``, ``gain`` and ``reward``; there is
no other state, and what cannot be read there is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from aurora_sgl.training.settings import TrainSettings

#: Weight of a run against that of the next one.
MEMORY = 0.97
#: Prior standard deviations in percent of the accept length: of an arm's effect, of what all runs
#: share, and of the noise of one run.
ARM_SPREAD, LEVEL_SPREAD, NOISE = 2.0, 5.0, 2.0
#: How many runs the prior of the noise is worth.
NOISE_RUNS = 4
#: Reward in percent beyond which a run counts no more: from an untrained base tens are gained.
LARGEST = 10.0
#: Probability of being better from which a level replaces the recipe's own.
SURE = 0.75

log = logging.getLogger(__name__)

Change = Callable[[TrainSettings], dict[str, Any]]


def _rate_times(factor: float) -> Change:
    return lambda r: {
        "learning_rate": r.learning_rate * factor,
        "mature_learning_rate": r.mature_learning_rate * factor,
    }


#: By knob and level what changes in a recipe, and the fields that the knob stands for.
ARMS: Mapping[tuple[str, str], Change] = {
    ("rate", "half"): _rate_times(0.5),
    ("rate", "double"): _rate_times(2.0),
    ("passes", "half"): lambda r: {"passes": max(1, r.passes // 2)},
    ("passes", "double"): lambda r: {"passes": 2 * r.passes},
    ("replay", "a quarter more"): lambda r: {
        name: min(0.75, getattr(r, name) + 0.25) for name in FIELDS["replay"]
    },
    ("alpha", "whole"): lambda _: {"line_search": False},
    ("vocabulary", "renew"): lambda _: {"vocabulary_threshold": 0.97},
}
FIELDS: Mapping[str, tuple[str, ...]] = {
    "rate": ("learning_rate", "mature_learning_rate"),
    "passes": ("passes",),
    "replay": ("replay_share", "mature_replay_share"),
    "alpha": ("line_search",),
    "vocabulary": ("vocabulary_threshold",),
}
_COLUMNS = {arm: number for number, arm in enumerate(ARMS)}


@dataclass(frozen=True)
class RunReward:
    """What one run took and what came of it."""

    arms: Mapping[str, str]  # level by knob; a knob that is missing was as the recipe has it
    reward: float


@dataclass(frozen=True)
class RecipeChoice:
    """The recipe of a run. ``effects``: of each arm the expected effect on the reward, and its
    standard deviation, in percent of the accept length."""

    settings: TrainSettings
    arms: dict[str, str] = field(default_factory=dict)
    explored: str = ""  # "knob: level" of the arm that was taken to find out
    effects: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Any]:
        """For ``training_run.metrics``."""
        effects = {name: [round(x, 3) for x in pair] for name, pair in self.effects.items()}
        return {"arms": self.arms, "explored": self.explored, "arm_effects": effects}


def reward_of(
    before: float, after: float, seconds: float, settings: TrainSettings
) -> tuple[float, float] | None:
    """(gain, reward) of a run whose base and result have these accept lengths, in percent; ``None``
    where nothing could be replayed."""
    if not (before > 0 and after > 0 and math.isfinite(before) and math.isfinite(after)):
        return None
    gain = 100 * math.log(after / before)
    return gain, gain - settings.training_cost * seconds / 3600


def past_rewards(metrics: Sequence[Mapping[str, Any]]) -> list[RunReward]:
    """Of the metrics of runs, in the order in which they are given, those that say a reward. One
    whose reward is no number, or whose arms are not known here, tells nothing: it is left out, and
    a line in the log says so."""
    rewards, odd = [], 0
    for one in metrics:
        arms, reward = one.get("arms"), one.get("reward")
        if arms is None and reward is None:
            continue
        if _is_usable(arms, reward):
            rewards.append(RunReward(dict(arms or {}), float(reward or 0.0)))
        else:
            odd += reward is not None
    if odd:
        log.warning("%d training runs say nothing that the choice of recipes can use", odd)
    return rewards


def _is_usable(arms: Any, reward: Any) -> bool:
    if not isinstance(arms, Mapping) or not isinstance(reward, int | float):
        return False
    return math.isfinite(reward) and all(arm in ARMS for arm in arms.items())


def choose(
    recipe: TrainSettings, rewards: Sequence[RunReward], *, seed: int | Sequence[int]
) -> RecipeChoice:
    """The recipe of the next run. ``rewards``: of past runs, the oldest first; the same rewards and
    seed give the same choice. Knobs that the recipe names itself stay as they are."""
    free = [arm for arm in ARMS if not recipe.model_fields_set.intersection(FIELDS[arm[0]])]
    if not recipe.explore or not free:
        return RecipeChoice(recipe)
    mean, covariance = posterior(rewards)
    spread = np.sqrt(np.diag(covariance))
    arms = _sure(free, mean, spread)
    rng = np.random.default_rng(seed)
    explored = ""
    if rng.random() < recipe.explore:
        drawn = rng.multivariate_normal(mean, covariance)
        knob, level = max(
            (arm for arm in free if arms.get(arm[0]) != arm[1]),
            key=lambda arm: drawn[_COLUMNS[arm]],
        )
        arms[knob] = level
        explored = f"{knob}: {level}"
    changes: dict[str, Any] = {}
    for arm in arms.items():
        changes |= ARMS[arm](recipe)
    effects = {": ".join(arm): (float(mean[i]), float(spread[i])) for arm, i in _COLUMNS.items()}
    return RecipeChoice(recipe.model_copy(update=changes), arms, explored, effects)


def _sure(
    free: Sequence[tuple[str, str]], mean: NDArray[np.float64], spread: NDArray[np.float64]
) -> dict[str, str]:
    """Of each knob the best level that is surely better than the recipe's own."""
    best: dict[str, str] = {}
    for knob, level in free:
        here = _COLUMNS[knob, level]
        if ndtr(mean[here] / spread[here]) < SURE:
            continue
        if knob not in best or mean[here] > mean[_COLUMNS[knob, best[knob]]]:
            best[knob] = level
    return best


def posterior(
    rewards: Sequence[RunReward],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [arms + 1] and covariance of the arms' effects and, last, of what all runs share."""
    size = len(ARMS) + 1
    rows = np.zeros((len(rewards), size))
    rows[:, -1] = 1.0
    for number, one in enumerate(rewards):
        for arm in one.arms.items():
            rows[number, _COLUMNS[arm]] = 1.0
    values = np.clip([one.reward for one in rewards], -LARGEST, LARGEST)
    weights = MEMORY ** np.arange(len(rewards))[::-1]
    prior = np.diag(np.array([ARM_SPREAD] * len(ARMS) + [LEVEL_SPREAD]) ** -2.0)
    noise = NOISE**2
    for _ in range(3):  # the noise and the effects, in turn
        precision = prior + (rows.T * weights) @ rows / noise
        covariance = np.asarray(np.linalg.inv(precision), dtype=np.float64)
        mean = covariance @ ((rows.T * weights) @ values) / noise
        left = float(weights @ (values - rows @ mean) ** 2)
        noise = (NOISE_RUNS * NOISE**2 + left) / (NOISE_RUNS + float(weights.sum()))
    return mean, covariance
