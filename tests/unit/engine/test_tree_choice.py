"""What a step's tree is chosen by: against the best fixed shape on a simulated server."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from aurora_sgl.batch_sizes import batch_bucket
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.engine.calibration import Ratios
from aurora_sgl.engine.tree_choice import TreePolicy, TreeStep
from aurora_sgl.engine.tree_costs import ENOUGH, TreeCosts

WHOLE = DraftShape(3, 4, 8)
TOPK = WHOLE.topk
#: (depth, nodes)
FIXED = [(1, 2), (1, 3), (1, 5), (2, 3), (2, 4), (2, 6), (3, 4), (3, 6), (3, 8)]


@dataclass
class Draft:
    """All that could be drafted for one request, and which candidates are right."""

    levels: list[list[float]]
    beams: list[list[float]]
    right: list[int]  # candidate by level, as far as the draft is right

    def __post_init__(self) -> None:
        scores = [score for level in self.levels for score in level]
        self.best_first = sorted(range(len(scores)), key=lambda c: -scores[c])

    def chosen(self, depth: int, nodes: int) -> list[int]:
        candidates = TOPK + (depth - 1) * TOPK**2
        return sorted([c for c in self.best_first if c < candidates][: nodes - 1])

    def accepted(self, chosen: list[int]) -> list[int]:
        path = []
        for candidate in self.right:
            if candidate not in chosen:
                break
            path.append(chosen.index(candidate) + 1)
        return path


@dataclass
class Traffic:
    """``sure``: share of the steps in which the drafter is nearly always right, and says so.
    ``honest``: its first token is accepted so many times as often as it says."""

    sure: float
    honest: float = 1.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def draft(self) -> Draft:
        first = 0.9 if self.random.random() < self.sure else 0.25
        beams, right = [(1.0, True)], []
        levels, kept = [], []
        offset = 0
        for _ in range(WHOLE.depth):
            scores, hits = [], []
            for score, is_right in beams:
                best = min(0.98, max(0.02, self.random.gauss(first, 0.1)))
                rest = [(1 - best) * share for share in (0.3, 0.15, 0.05)]
                scores += [score * p for p in (best, *rest)]
                coin = self.random.random()
                chances = (min(0.99, best * self.honest), *rest)
                hit = next((n for n in range(TOPK) if coin < sum(chances[: n + 1])), TOPK)
                hits += [is_right and n == hit for n in range(TOPK)]
            order = sorted(range(len(scores)), key=lambda c: -scores[c])[:TOPK]
            levels.append(scores)
            kept.append([scores[c] for c in order])
            if any(hits):
                right.append(offset + hits.index(True))
            offset += len(scores)
            beams = [(scores[c], hits[c]) for c in order]
        stop = next((n for n, pair in enumerate(pairwise(right)) if pair[0] > pair[1]), len(right))
        return Draft(levels, kept, right[: stop + 1])


@dataclass
class Server:
    """Its steps take what the test says: ``row`` of each node, beside 1 of the first row."""

    policy: TreePolicy
    traffic: Callable[[int], Traffic]  # by step
    row: float = 0.1
    level: float = 0.08
    streams: Callable[[int], int] = lambda step: 1
    noise: Callable[[int], float] = lambda step: 1.0
    random: random.Random = field(default_factory=lambda: random.Random(1))
    shapes: list[tuple[int, int]] = field(default_factory=list)

    def seconds(self, depth: int, nodes: int, streams: int) -> float:
        return 1.2 + self.level * (depth - 1) + self.row * (nodes * streams - 1)

    def run(self, steps: int, warm_up: int) -> float:
        """Tokens per second after the warm-up over those of the fixed shape that was best."""
        made, spent = 0.0, 0.0
        fixed = {shape: [0.0, 0.0] for shape in FIXED}
        for number in range(steps):
            streams, counts = self.streams(number), number >= warm_up
            drafts = [self.traffic(number).draft() for _ in range(streams)]
            depth, nodes, accepted = self.step(number, drafts)
            made += counts * (streams + accepted)
            spent += counts * self.seconds(depth, nodes, streams)
            for shape, sums in fixed.items() if counts else ():
                sums[0] += sum(1 + len(one.accepted(one.chosen(*shape))) for one in drafts)
                sums[1] += self.seconds(*shape, streams)
        best = max(tokens / seconds for tokens, seconds in fixed.values()) if spent else 1.0
        return made / spent / best if spent else float("nan")

    def step(self, number: int, drafts: list[Draft]) -> tuple[int, int, int]:
        rows = list(range(len(drafts)))
        step = self.policy.begin(len(drafts), rows, [False] * len(drafts))
        depth = grow(step, drafts)
        nodes, noise = step.end(), self.noise(number) * self.random.gauss(1.0, 0.05)
        whole = self.seconds(depth, nodes, len(drafts)) * noise
        levels = [self.level * noise] * (depth - 1)
        self.policy.done(step, levels, whole - sum(levels))
        accepted = 0
        for row, draft in enumerate(drafts):
            chosen = draft.chosen(depth, nodes)
            path = draft.accepted(chosen)
            self.policy.learn(step, row, chosen, path)
            accepted += len(path)
        self.shapes.append((depth, nodes))
        return depth, nodes, accepted


def grow(step: TreeStep, drafts: list[Draft]) -> int:
    for depth in range(WHOLE.depth):
        candidates, beams = [d.levels[depth] for d in drafts], [d.beams[depth] for d in drafts]
        if not step.level(candidates, beams, depth == WHOLE.depth - 1):
            return depth + 1
    return WHOLE.depth


def both_kinds() -> Callable[[int], Traffic]:
    chat, narrow = Traffic(0.2), Traffic(0.7)
    return lambda step: narrow if step // 40 % 2 else chat


@pytest.mark.parametrize(("row", "least"), [(0.05, 1.02), (0.3, 1.03)])
@pytest.mark.parametrize("streams", [1, 4])
def test_trees_by_the_drafters_confidence_beat_the_best_fixed_shape(row, least, streams) -> None:
    server = Server(TreePolicy(WHOLE), both_kinds(), row=row / streams, streams=lambda _: streams)
    assert server.run(1200 // streams, 400 // streams) >= (least if streams == 1 else 0.99)


@pytest.mark.parametrize("kind", ["a swap", "costs that drift", "a busy machine", "overconfident"])
def test_it_is_never_far_below_the_best_fixed_shape(kind: str) -> None:
    server = Server(TreePolicy(WHOLE), both_kinds())
    if kind == "costs that drift":
        noise = {0: 1.0, 1: 1.4, 2: 0.8}
        server.noise = lambda step: noise[step // 150 % 3]
    elif kind == "a busy machine":
        coin = random.Random(2)
        server.noise = lambda step: 4.0 if coin.random() < 0.05 else 1.0
    elif kind == "overconfident":
        overconfident = Traffic(0.5, honest=0.6)
        server.traffic = lambda step: overconfident
    else:
        server.run(400, 400)
        server.policy.swapped()
        bad = Traffic(0.0, honest=0.3)
        server.traffic = lambda step: bad
    assert server.run(1300, 500) >= 0.98


def test_load_that_oscillates_round_a_threshold_leaves_each_group_its_trees() -> None:
    """vLLM's issue 49548: a policy that follows the last step's load changes with each step."""
    policy = TreePolicy(WHOLE)
    server = Server(policy, both_kinds(), row=0.1, streams=lambda step: 4 + step % 2)
    assert server.run(700, 300) >= 0.98
    assert {batch_bucket(4), batch_bucket(5)} == set(policy.groups)


def test_finding_out_costs_no_more_than_its_bound() -> None:
    policy = TreePolicy(WHOLE)
    server = Server(policy, both_kinds(), row=0.3)
    server.run(1000, 1000)
    group = policy.group(1)
    assert 2 <= group.explored <= 1000 * 0.05
    free = TreePolicy(WHOLE, loss=0.0)
    Server(free, both_kinds(), row=0.3).run(400, 400)
    assert free.group(1).explored == 0


def test_what_a_row_costs_decides_how_many_are_verified() -> None:
    def mean_nodes(row: float) -> float:
        server = Server(TreePolicy(WHOLE), both_kinds(), row=row)
        server.run(300, 300)
        return sum(nodes for _, nodes in server.shapes[100:]) / 200

    assert mean_nodes(0.01) > mean_nodes(0.1) + 0.5 > mean_nodes(0.5) + 1.0


def test_scores_that_are_no_numbers_choose_the_root_alone_and_teach_nothing() -> None:
    policy = TreePolicy(WHOLE, loss=0.0)
    Server(policy, both_kinds()).run(200, 200)
    before = json.dumps(policy.state())
    nan = float("nan")
    step = policy.begin(1, [0], [False])
    assert not step.explores
    assert not step.level([[nan] * TOPK], [[nan] * TOPK], False)
    step.end()
    policy.done(step, [], nan)
    policy.learn(step, 0, [0], [1])
    assert json.dumps(policy.state()["ratios"]) == json.dumps(json.loads(before)["ratios"])
    assert "NaN" not in json.dumps(policy.state())


# -- between two starts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt() -> TreePolicy:
    policy = TreePolicy(WHOLE)
    Server(policy, both_kinds()).run(300, 150)
    return policy


def test_a_restart_goes_on_from_what_was_learnt(learnt: TreePolicy) -> None:
    again = TreePolicy(WHOLE)
    again.restore(json.loads(json.dumps(learnt.state())), same_drafter=True)
    assert again.group(1).costs.untimed is None
    assert again.group(1).rate == pytest.approx(learnt.group(1).rate)
    # Not a step of its warm-up: it is as good from the first.
    assert Server(again, both_kinds()).run(400, 0) >= 1.0


def test_of_another_drafter_only_step_times_are_taken_over(learnt: TreePolicy) -> None:
    again = TreePolicy(WHOLE)
    again.restore(learnt.state(), same_drafter=False)
    assert again.group(1).costs.of(2, 4) == pytest.approx(learnt.group(1).costs.of(2, 4), rel=0.2)
    assert again.group(1).rate == 0.0
    assert again.state()["ratios"] == TreePolicy(WHOLE).state()["ratios"]


def damaged(state: dict[str, object]) -> Iterator[dict[str, object]]:
    text = json.dumps(state)
    yield {**state, "whole": [2, 4, 8]}
    yield {name: value for name, value in state.items() if name != "ratios"}
    yield {**state, "groups": {"1": {}}}
    yield {**state, "groups": {"many": {}}}
    yield {**state, "groups": []}
    yield {**state, "ratios": [1, 2]}
    yield json.loads(text.replace('"accepted": [[', '"accepted": [[NaN, '))
    yield json.loads(text.replace('"rest": {', '"rest": {"1000": 1, '))
    yield json.loads(text.replace('"levels": [', '"levels": [-1, '))
    yield json.loads(text.replace('"rate": [', '"rate": ["x", '))
    yield json.loads(text.replace('"worth": [', '"worth": [[], '))


def test_a_damaged_state_or_one_of_other_shapes_is_refused_whole(learnt: TreePolicy) -> None:
    for state in damaged(learnt.state()):
        again = TreePolicy(WHOLE)
        before = again.state()
        with pytest.raises(ValueError, match=r"."):
            again.restore(state, same_drafter=True)
        assert again.state() == before


# -- its parts -------------------------------------------------------------------------------------


def test_a_drafter_that_says_too_much_is_believed_less() -> None:
    ratios = Ratios(2)
    coin = random.Random(0)
    for _ in range(1000):
        ratios.count(0, 0.8, coin.random() < 0.4)
        ratios.count(1, 0.3, coin.random() < 0.3)
    assert ratios.chance(0, 0.8) == pytest.approx(0.4, abs=0.05)
    assert ratios.chance(1, 0.3) == pytest.approx(0.3, abs=0.06)
    assert ratios.chance(1, 0.05) == pytest.approx(0.05)
    ratios.fade()
    assert 0.4 < ratios.chance(0, 0.8) < 0.8
    for _ in range(60):
        ratios.count(0, 0.8, True)
    assert ratios.chance(0, 0.8) > 0.8


def test_times_are_relative_to_the_steps_around_them() -> None:
    costs = TreeCosts(3, 8)
    for _ in range(10 * ENOUGH):
        for nodes in range(1, 9):
            costs.add([0.1, 0.1], nodes, 1.0 + 0.1 * nodes)
    assert costs.untimed is None
    for _ in range(100):  # the machine is slower, and only whole trees are made
        costs.add([0.3, 0.3], 8, 5.4)
    assert costs.rest[2] / costs.rest[8] == pytest.approx(1.2 / 1.8, rel=0.15)
    assert all(a <= b for a, b in pairwise(costs.rest[1:]))
