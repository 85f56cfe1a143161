"""The gate against drafters that were damaged on purpose, with the real replay."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aurora_sgl.drafter import scratch
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.gate import PASS, judge
from aurora_sgl.evaluation.replay import RequestReplay, replay_one
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from tests.support.drafter_cases import RECIPE, VOCAB, requests, target_folder

TRIES = 50
#: Other targets; a drafter of each is tried on requests that no other try has.
OTHERS = 3
#: Slower than what others learn with: twelve requests have to tell what it learns from damage.
SLOWLY = {**RECIPE, "batch_requests": 2, "learning_rate": 7e-3}
SETTINGS = TrainSettings(**SLOWLY, objective="forward_kl")


class World:
    """A good drafter of a target, some of other targets of the same shape, and requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = target_folder(folder / "target")
        self.head = TargetHead.load(self.folder)
        self.good = self.learn(requests(self.head, 30))
        self.others = [
            self.learn([elsewhere(each, other) for each in requests(self.head, 30, seed=other)])
            for other in range(OTHERS)
        ]
        self.held_out = [requests(self.head, 10, seed=1000 + seed) for seed in range(TRIES)]
        self.before = [self.replay(self.good, each) for each in self.held_out]

    def learn(self, served: list[Sequence]) -> Drafter:
        drafter = scratch.make(self.folder, draft_vocab_size=VOCAB, seed=1)
        return train(drafter, served, self.head, SETTINGS).drafter.eval()

    def replay(self, drafter: Drafter, held_out: list[Sequence]) -> list[RequestReplay]:
        return [replay_one(drafter, each, SETTINGS.shape, self.head) for each in held_out]


def elsewhere(one: Sequence, other: int) -> Sequence:
    """The same request at a target whose hidden states mean something else."""
    turned = one.features.roll(5 + 2 * other, dims=1) * -1
    return replace(one, features=turned)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("damaged"))


def shuffled(world: World, seed: int) -> Drafter:
    """The weights of the drafter's layer, each in another place of its matrix."""
    drafter, generator = copy.deepcopy(world.good), torch.Generator().manual_seed(seed)
    layer = [p for name, p in drafter.named_parameters() if "midlayer" in name and p.dim() > 1]
    with torch.no_grad():
        for parameter in layer:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return drafter


def noisy(world: World, seed: int) -> Drafter:
    """Noise as large as the weights themselves."""
    drafter, generator = copy.deepcopy(world.good), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std())
    return drafter


def of_another_target(world: World, seed: int) -> Drafter:
    return world.others[seed % OTHERS]


@pytest.mark.parametrize("damage", [shuffled, noisy, of_another_target])
def test_a_damaged_drafter_never_passes_the_gate(
    world: World, damage: Callable[[World, int], Drafter]
) -> None:
    verdicts = []
    for seed in range(TRIES):
        after = world.replay(damage(world, seed), world.held_out[seed])
        verdicts.append(judge(world.before[seed], after, seed=seed).verdict)  # each a line's first
    assert PASS not in verdicts
    assert Counter(verdicts)["fail"] >= 10, "the damage is seen, not only not missed"


def test_the_drafter_itself_passes_against_the_damaged_one(world: World) -> None:
    held_out = requests(world.head, 12, seed=5)
    before = world.replay(shuffled(world, 0), held_out)
    found = judge(before, world.replay(world.good, held_out))
    assert found.verdict == PASS, found.reason
