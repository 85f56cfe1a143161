"""The share of steps with drafts stays within its bound."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from aurora_sgl.batch_sizes import batch_bucket
from aurora_sgl.draft_shape import NO_DRAFT, DraftShape
from aurora_sgl.engine.policy import TRY_STEPS, Admission, SpeculationPolicy, in_shape
from aurora_sgl.engine.step_shape import StepShape, shapes_within
from aurora_sgl.step_cost import ShapeTimes


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("streams", [1, 8])
def test_steps_with_drafts_stay_near_their_share(share: float, streams: int) -> None:
    rng = random.Random(0)
    policy = SpeculationPolicy(share)
    running: list[tuple[int, bool]] = []  # steps left, speculates
    for _ in range(20_000):
        while len(running) < streams:
            running.append((rng.randint(20, 100), policy.admit() is not Admission.PLAIN))
        drafts = any(speculates for _, speculates in running)
        policy.account(shape=ONE if drafts else NO_DRAFT, batch_size=streams, seconds=0.001)
        running = [(left - 1, speculates) for left, speculates in running if left > 1]
    part = policy.speculative_steps / (policy.speculative_steps + policy.plain_steps)
    if share in (0.0, 1.0):
        assert part == share
    else:
        assert 0.3 * share <= part <= share + 0.02


def test_step_times_are_compared_at_one_batch_size_only_when_both_kinds_are_known() -> None:
    policy = SpeculationPolicy(0.5)
    for _ in range(20):
        policy.account(shape=NO_DRAFT, batch_size=1, seconds=0.010)
        policy.account(shape=ONE, batch_size=8, seconds=0.080)
    assert "step_ms_plain" not in policy.counters()
    for _ in range(10):
        policy.account(shape=ONE, batch_size=1, seconds=0.014)
    assert policy.counters()["step_ms_plain"] == pytest.approx(10.0)
    assert policy.counters()["step_ms_spec"] == pytest.approx(14.0)
    # By load and shape only where both kinds are known: of 8 at once no plain step was timed.
    by_shape = ShapeTimes.of(policy.counters()).by_shape
    assert by_shape == {(1, 0, 1): pytest.approx(10.0), (1, 1, 2): pytest.approx(14.0)}


ONE = DraftShape(1)
CHAIN, TREE = shapes_within(DraftShape(3)), shapes_within(DraftShape(3, 4, 8))
#: Time of a step with drafts over that of one without, by groups of requests at once.
RATIOS = {1: 1.3, 2: 1.4, 4: 1.6, 8: 1.9, 16: 2.4, 32: 3.0, 64: 3.5, 128: 4.0, 256: 4.5}


@dataclass
class Running:
    left: float  # tokens
    drafts: bool
    keeps: float  # steps


class House:
    """A server whose steps take as long, and bring as much, as the test says; its own clock.

    ``chance``: that one more token of a draft is accepted; without it every step with drafts brings
    ``accept_length``, however deep it is.
    """

    def __init__(
        self, policy: SpeculationPolicy, accept_length: float, chance: float | None = None
    ) -> None:
        self.policy, self.accept_length, self.chance = policy, accept_length, chance
        self.random = random.Random(0)
        self.depths: Counter[tuple[int, int]] = Counter()
        #: How many times as long a step takes as on a quiet machine.
        self.noise: Callable[[], float] = lambda: 1.0

    def brings(self, depth: int) -> int:
        if self.chance is None:
            more = self.random.random() < self.accept_length % 1
            return int(self.accept_length) + more
        brought = 1
        while brought <= depth and self.random.random() < self.chance:
            brought += 1
        return brought

    def ratio(self, streams: int, depth: int) -> float:
        if len(self.policy.shapes) == 1:
            return RATIOS[min(256, batch_bucket(streams))]
        # Rows of a step cost nothing up to four and then a ninth of a plain step each.
        rows = streams * 2**depth
        return 1.1 + 0.08 * depth + max(0, rows - 4) / 9 - max(0, streams - 4) / 9

    def begin(self, size: int) -> Running:
        admitted = self.policy.admit(size)
        keeps = TRY_STEPS if admitted is Admission.TRIES else 0
        return Running(64.0, admitted is not Admission.PLAIN, keeps)

    def speed_up(self, streams: int, tokens: int) -> float:
        """Tokens per second over those without drafts; requests of 64 tokens, then the next."""
        spent = plain = made = 0.0
        running: list[Running] = []
        while made < tokens:
            while len(running) < streams:
                running.append(self.begin(len(running) + 1))
            drafting = [one for one in running if one.drafts]
            probes = bool(drafting) and self.policy.probes(streams)
            if drafting and not probes and not self.policy.keeps(streams):
                for one in drafting:
                    one.drafts = one.keeps > 0
                    one.keeps -= 1
                drafting = [one for one in drafting if one.drafts]
            shape = self.policy.shape(streams) if drafting and not probes else NO_DRAFT
            depth = shape.depth
            self.depths[streams, depth] += 1
            base = 0.030 * (1 + 0.02 * streams)
            ratio = self.ratio(streams, depth) if depth else 1.0
            took = base * ratio * self.random.gauss(1.0, 0.05)
            seconds = took * self.noise()
            self.policy.account(shape=shape, batch_size=streams, seconds=seconds)
            spent += took + (0.12 * base if probes else 0.0)  # the draft KV that it keeps
            accepted = 0
            for one in running:
                brought = 1.0
                if one.drafts and not probes:
                    brought = self.brings(depth)
                    accepted += int(brought) - 1
                one.left -= brought
                made += brought
                plain += brought * base / streams
            if depth:
                self.policy.observe(0, shape, len(drafting), accepted)
            running = [one for one in running if one.left > 0]
        return plain / spent


@pytest.mark.parametrize("accept_length", [1.0, 1.35, 1.75, 2.6])
@pytest.mark.parametrize("streams", [1, 4, 16])
def test_drafts_never_cost_more_than_a_fiftieth_at_any_load(streams, accept_length) -> None:
    policy = SpeculationPolicy(1.0)
    house = House(policy, accept_length)
    house.speed_up(streams, 4000)  # finds out what both kinds of steps take
    ratio = RATIOS[streams]
    speed_up = house.speed_up(streams, 40_000)
    assert speed_up >= 0.98
    if accept_length > 1.1 * ratio:
        assert speed_up >= 0.97 * accept_length / ratio
    if accept_length < ratio:
        assert policy.pays(streams) is False


def bursts(house: House) -> Callable[[], float]:
    """Another process now and then takes the machine, for some steps each time."""
    left = [0, 1.0]

    def noise() -> float:
        if left[0] <= 0:
            left[:] = [house.random.randint(5, 60), house.random.choice((1.0, 1.3, 2.5, 6.0))]
        left[0] -= 1
        return left[1]

    return noise


@pytest.mark.parametrize("shapes", [(ONE,), CHAIN, TREE], ids=["one", "chain", "tree"])
@pytest.mark.parametrize("streams", [1, 4, 16])
@pytest.mark.parametrize("gain", [0.75, 1.0, 1.4])
def test_what_was_timed_in_a_noisy_minute_is_put_right_within_300_steps(
    shapes: tuple[DraftShape, ...], streams: int, gain: float
) -> None:
    """In both directions: drafts that pay are found again, and those that lose are left."""
    chance, gain = chance_for(gain, streams, shapes)
    speeds = []
    for seed in range(4):
        house = House(SpeculationPolicy(1.0, shapes=shapes), 0.0, chance=chance)
        house.random.seed(seed)
        house.noise = bursts(house)
        house.speed_up(streams, 300 * streams)
        house.noise = lambda: 1.0
        house.speed_up(streams, 300 * streams)  # a step brings a token or more
        speeds.append(house.speed_up(streams, 1500 * streams))
    # A first step in a shape that takes fourteen plain ones is felt, with 16 chains of three.
    least = 0.98 if house.ratio(streams, shapes[-1].depth) < 10 else 0.96
    assert sum(speeds) / len(speeds) >= max(least, 0.94 * gain)
    assert min(speeds) >= 0.95


def chance_for(gain: float, streams: int, shapes: tuple[DraftShape, ...]) -> tuple[float, float]:
    """That a draft's next token is accepted where the best shape brings ``gain``, or the most that
    any can; and what it brings."""
    house = House(SpeculationPolicy(1.0, shapes=shapes), 0.0)

    def brings(chance: float) -> float:
        return max(
            sum(chance**level for level in range(one.depth + 1)) / house.ratio(streams, one.depth)
            for one in shapes
        )

    low, high = 0.0, 0.9
    for _ in range(30):
        chance = (low + high) / 2
        low, high = (chance, high) if brings(chance) < gain else (low, chance)
    return low, brings(low)


def test_a_batch_is_in_the_group_that_the_store_sums_it_in() -> None:
    policy = SpeculationPolicy(1.0)
    for size, seconds in ((4, 0.010), (5, 0.050)):
        for _ in range(10):
            policy.account(shape=NO_DRAFT, batch_size=size, seconds=seconds)
            policy.account(shape=ONE, batch_size=size, seconds=2 * seconds)
    assert {name for name in policy.counters() if name.startswith("break_even_")} == {
        f"break_even_{batch_bucket(size)}" for size in (4, 5)
    }
    for _ in range(10):
        policy.account(shape=ONE, batch_size=8, seconds=0.150)  # as 5 are
    assert policy.break_even(4) == pytest.approx(2.0)
    assert policy.break_even(5) == policy.break_even(8) == pytest.approx(3.0)


def test_a_load_at_which_drafts_lose_leaves_them_to_another_at_which_they_pay() -> None:
    house = House(SpeculationPolicy(1.0), 1.8)
    for streams in (1, 16):
        house.speed_up(streams, 4000)
    for _ in range(3):
        assert house.speed_up(16, 8000) >= 0.98
        assert house.speed_up(1, 8000) >= 1.3
    counters = house.policy.counters()
    assert counters["break_even_1"] == pytest.approx(1.3, abs=0.05)
    assert counters["break_even_16"] == pytest.approx(2.4, abs=0.1)


def test_300_requests_at_once_lose_their_drafts_within_some_steps() -> None:
    house = House(SpeculationPolicy(1.0), 1.9)
    house.speed_up(1, 4000)
    house.speed_up(300, 60_000)
    before = house.policy.speculative_steps
    assert house.speed_up(300, 60_000) >= 0.98
    assert house.policy.speculative_steps - before <= TRY_STEPS
    assert house.speed_up(1, 4000) >= 1.3


def test_drafts_come_back_when_a_better_drafter_is_live_or_the_traffic_suits_it_again() -> None:
    house = House(SpeculationPolicy(1.0), 1.0)
    house.speed_up(4, 8000)
    assert house.policy.admit(4) is not Admission.DRAFTS
    house.policy.swapped(1)
    house.policy.expected_accept_length = 2.1  # as replay says of the new version
    assert house.policy.admit(4) is Admission.DRAFTS
    house.policy.swapped(0)
    house.accept_length = 1.1  # live traffic says otherwise
    assert house.speed_up(4, 20_000) >= 0.97
    assert house.policy.pays(4) is False
    house.accept_length = 2.5  # and now it suits: those that try find out
    house.speed_up(4, 200_000)
    assert house.policy.pays(4) is True


def test_busier_steps_carry_shallower_drafts_and_each_load_its_best() -> None:
    house = House(SpeculationPolicy(1.0, shapes=CHAIN), 0.0, chance=0.7)
    lengths = {1: 1.7, 2: 2.19, 3: 2.533}
    for streams in (1, 2, 4):
        house.speed_up(streams, 12_000)
    chosen = {}
    for streams in (1, 2, 4):
        house.depths.clear()
        speed_up = house.speed_up(streams, 30_000)
        possible = {depth: lengths[depth] / house.ratio(streams, depth) for depth in lengths}
        chosen[streams] = house.depths.most_common(1)[0][0][1]
        assert speed_up >= 0.95 * max(1.0, *possible.values()), (streams, possible)
        assert possible[chosen[streams]] >= 0.95 * max(possible.values())
    assert chosen[1] > chosen[4]
    counters = house.policy.counters()
    assert counters["depth_1"] == chosen[1] and counters["gain_1"] > counters["gain_4"] > 1.0


def test_depths_that_can_not_pay_are_hardly_made() -> None:
    house = House(SpeculationPolicy(1.0, shapes=CHAIN), 0.0, chance=0.05)
    assert house.speed_up(16, 60_000) >= 0.97
    assert house.depths[16, 3] == 0 and house.depths[16, 2] <= 2 * TRY_STEPS
    assert house.policy.pays(16) is False


def test_one_depth_tells_of_the_others_until_they_are_seen() -> None:
    policy = SpeculationPolicy(1.0, shapes=CHAIN)
    policy.expected_accept_length = 1 + 0.5 + 0.25 + 0.125
    one, _, three = CHAIN
    assert policy.accept_length(one) == pytest.approx(1.5, abs=1e-3)
    policy.observe(0, one, 100, 80)
    assert policy.accept_length(one) == pytest.approx(1.8)
    assert policy.accept_length(three) == pytest.approx(1 + 0.8 + 0.64 + 0.512, abs=1e-3)
    policy.observe(0, three, 100, 150)
    assert policy.accept_length() == pytest.approx(2.5)
    assert in_shape(1.0, three, one) == pytest.approx(1.0, abs=1e-3)
    assert in_shape(4.0, three, one) == pytest.approx(2.0)
    # Replays of two drafters, with depths 1, 1, 2, 3 and 2, 4, 4, 8 nodes.
    for lengths in ((1.31, 1.45, 1.53, 1.64), (1.47, 1.63, 1.84, 2.15)):
        told = [in_shape(lengths[0], TREE[0], shape) for shape in TREE]
        assert told == pytest.approx(lengths, abs=0.05)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((3, 4, 8), [(1, 2), (1, 4), (2, 4), (3, 8)]),
        ((2, 4, 6), [(1, 2), (1, 4), (2, 6)]),
        ((5, 4, 12), [(1, 2), (1, 4), (2, 4), (3, 8), (4, 12), (5, 12)]),
        ((3, 1, 4), [(1, 2), (2, 3), (3, 4)]),
        ((1, 4, 5), [(1, 2), (1, 5)]),
        ((1, 4, 2), [(1, 2)]),
        ((4, 2, 5), [(1, 2), (1, 3), (2, 4), (3, 5), (4, 5)]),
    ],
)
def test_no_two_shapes_share_depth_and_branching(given, expected) -> None:
    found = shapes_within(DraftShape(*given))
    assert [(shape.depth, shape.nodes) for shape in found] == expected
    assert found[-1] == DraftShape(*given)
    assert len({(shape.depth, shape.topk) for shape in found}) == len(found)


@pytest.mark.parametrize("topk", [1, 4])
@pytest.mark.parametrize("levels", [1, 3])
def test_a_shape_is_in_the_worker_for_one_step_and_gone_after_it(topk: int, levels: int) -> None:
    whole = DraftShape(levels, topk, levels + 1 if topk == 1 else min(8, levels * topk))
    shape = {"speculative_num_steps": whole.depth, "speculative_num_draft_tokens": whole.nodes}
    rows = torch.arange(levels).repeat(5, 1)
    drafter = SimpleNamespace(
        **shape,
        draft_attn_backend=SimpleNamespace(speculative_num_steps=levels) if levels > 1 else None,
        _topk1_parents_prealloc=rows - 1,
        _topk1_score_indices_prealloc=rows,
    )
    worker = SimpleNamespace(**shape, topk=topk, draft_worker=drafter)
    before, switch = repr(worker), StepShape(worker, whole)
    for shape in (NO_DRAFT, *shapes_within(whole)):
        with suppress(KeyError), switch.set_to(shape):
            assert (worker.speculative_num_steps, worker.speculative_num_draft_tokens) == (
                shape.depth,
                shape.nodes,
            )
            if shape.depth:
                assert drafter.speculative_num_draft_tokens == shape.nodes
                assert (
                    levels == 1 or drafter.draft_attn_backend.speculative_num_steps == shape.depth
                )
            if shape.depth and topk == 1 and levels > 1:  # as SGLang itself lays them out
                parents = torch.arange(-1, shape.depth - 1 if shape.depth > 1 else -1)
                assert drafter._topk1_parents_prealloc.equal(parents.repeat(5, 1))
                indices = drafter._topk1_score_indices_prealloc
                assert indices.is_contiguous()
                assert indices.equal(torch.arange(shape.depth).repeat(5, 1))
            raise KeyError  # a step that fails
        assert repr(worker) == before


def test_a_step_that_keeps_draft_kv_computes_it_and_says_what_that_took() -> None:
    from sglang.srt.environ import envs

    switch = envs.SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND

    class Drafter(SimpleNamespace):
        def _draft_extend_for_decode(self, rows: int) -> tuple[int, int, bool]:
            time.sleep(0.02)
            return rows, self.speculative_num_draft_tokens, bool(switch.get())

    whole = DraftShape(3, 4, 8)
    shape = {"speculative_num_steps": 3, "speculative_num_draft_tokens": 8}
    drafter = Drafter(**shape, draft_attn_backend=SimpleNamespace(speculative_num_steps=3))
    worker = SimpleNamespace(**shape, topk=4, draft_worker=drafter)
    before, steps = repr(worker), StepShape(worker, whole)
    assert steps.can_keep_kv
    with switch.override(True):
        steps.keeps_kv = True
        with steps.set_to(NO_DRAFT):
            assert drafter._draft_extend_for_decode(5) == (5, 1, False)
        assert steps.kv_seconds >= 0.02 and not steps.keeps_kv and repr(worker) == before
        assert drafter._draft_extend_for_decode(5) == (5, 8, True)
        with steps.set_to(NO_DRAFT):
            assert drafter.speculative_num_draft_tokens == 8
        assert steps.kv_seconds == 0.0
    worker.draft_worker = SimpleNamespace()  # of a release that has no such step
    assert not StepShape(worker, whole).can_keep_kv


def test_where_everything_is_to_carry_drafts_nothing_is_left_out() -> None:
    house = House(SpeculationPolicy(1.0, by_size=False), 1.0)
    house.speed_up(16, 4000)
    assert house.policy.plain_steps == 0
    assert house.policy.keeps(16) and house.policy.admit(16) is Admission.DRAFTS


def test_an_expectation_of_another_version_is_forgotten_with_it() -> None:
    policy = SpeculationPolicy(1.0)
    policy.expected_accept_length = 2.0
    policy.observe(0, ONE, 100, 50)
    assert policy.accept_length() == pytest.approx(1.5)
    policy.swapped(1)
    assert policy.accept_length() is None
    policy.expected_accept_length = 1.9
    policy.observe(1, ONE, 10, 0)
    assert policy.accept_length() == 1.9


@pytest.mark.parametrize(
    ("accept_length", "mode", "share"),
    [(2.4, True, 1.0), (1.1, True, 0.1), (None, True, 0.1), (2.4, False, 0.1)],
)
def test_without_a_sidecar_what_the_server_measured_decides(
    accept_length: float | None, mode: bool, share: float
) -> None:
    """Also a way back, and nothing where a setting decides."""
    policy = SpeculationPolicy(0.1, by_size=mode)
    policy.decide_alone()
    assert policy.share == 0.1, "nothing was measured yet"
    for _ in range(100):
        policy.account(shape=NO_DRAFT, batch_size=1, seconds=0.010)
        policy.account(shape=ONE, batch_size=1, seconds=0.014)
        if accept_length is not None:
            policy.observe(0, ONE, 10, round(10 * (accept_length - 1)))
    policy.decide_alone()
    assert policy.share == share
    if share == 1.0:
        assert policy.admit() is Admission.DRAFTS
        for _ in range(200):
            policy.observe(0, ONE, 10, 0)
        policy.decide_alone()
        assert policy.share == 0.1, "the traffic has changed"
