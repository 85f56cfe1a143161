"""The gate: what it says of small strata, many tries and many promotions; small simulations."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from aurora_sgl.config import GateSettings
from aurora_sgl.evaluation.evidence import log_evidence, steps_saved
from aurora_sgl.evaluation.gate import FAIL, INCONCLUSIVE, PASS, CandidateLine, judge, pairs_of
from aurora_sgl.evaluation.pooling import StratumChange, harmed, pool
from aurora_sgl.evaluation.replay import RequestReplay
from aurora_sgl.evaluation.standing import Reach, advance
from benchmarks.gate import HELD_OUT, MANY, Live, ten_promotions
from benchmarks.simulated_traffic import Mix
from tests.support.replays import more, replayed


def test_better_worse_and_neither_have_their_verdicts() -> None:
    before = replayed(20, 30)
    assert judge(before, more(before, 4)).verdict == PASS
    assert judge(before, more(before, -8)).verdict == FAIL
    assert judge(before, more(before, -1)).verdict == INCONCLUSIVE  # -1, 0 or 1
    few = judge(before[:3], more(before[:3], 9))
    assert (few.verdict, few.attempt) == (INCONCLUSIVE, None), "three requests are no try"
    with pytest.raises(ValueError, match="the same requests"):
        judge(before, before[::-1])


def test_six_requests_prove_what_is_much_better_and_turns_of_one_chat_do_not() -> None:
    before = replayed(6, 20)
    after = more(before, 20)
    assert judge(before, after).verdict == PASS
    of_one = [[replace(r, conversation="one") for r in both] for both in (before, after)]
    assert judge(*of_one).verdict == INCONCLUSIVE


@pytest.mark.parametrize("count", [1, 4, 8])
def test_the_evidence_of_equal_versions_is_one_on_the_mean(count: int) -> None:
    sizes = np.array([0.1, 3.0, 1.0, 0.5, 7.0, 1.0, 2.0, 0.3])[:count]
    signs = product((-1, 1), repeat=count)
    values = [math.exp(log_evidence(sizes * np.array(each))) for each in signs]
    assert np.mean(values) == pytest.approx(1.0)
    assert max(values) <= 2**count


def test_a_version_that_covers_fewer_tokens_of_a_log_has_saved_nothing() -> None:
    old, new = RequestReplay(1, 20, 20), RequestReplay(1, 19, 19)
    assert steps_saved([(old, new)]) == pytest.approx([0.0])


def test_evidence_of_a_line_counts_a_conversation_once() -> None:
    before = [replace(r, conversation=f"c{r.request_id % 8}") for r in replayed(24, 30)]
    after = more(before, 2)
    first = judge(before, after)
    line = CandidateLine(1, first.log_e, [r.request_id for r in before[:8]], [])
    again = judge(before, after, line=line)
    assert (first.fresh, again.fresh, again.log_e) == (8, 0, first.log_e)


def change(value: float, error: float) -> StratumChange:
    return StratumChange(value, error, 20, 10, 10)


def test_a_small_stratum_is_judged_by_what_the_others_say_unless_it_contradicts_them() -> None:
    others = {f"all/{number}": change(0.05, 0.02) for number in range(19)}
    doubtful = pool({**others, "all/x": change(-0.06, 0.08)}, 0.05)[1]["all/x"]
    fallen = pool({**others, "all/x": change(-0.36, 0.08)}, 0.05)[1]["all/x"]
    alone = pool({"all/x": change(-0.06, 0.08)}, 0.05)[1]["all/x"]
    assert doubtful.chance < 0.10 < alone.chance < fallen.chance
    assert (
        doubtful.mean > 0.02
        and fallen.mean < -0.15
        and alone.mean == pytest.approx(-0.06, abs=1e-3)
    )


def test_harm_is_proven_by_a_stratum_itself_and_by_more_where_there_are_many() -> None:
    fallen = {"all/x": change(-0.30, 0.1)}
    others = {f"all/{number}": change(0.05, 0.02) for number in range(40)}
    assert harmed(fallen, 0.05, 0.05) == ["all/x"]
    assert harmed({**fallen, **others}, 0.05, 0.05) == []


def test_losses_add_up_until_a_new_highest_point() -> None:
    standing: dict[str, Reach] = {}
    for expected in (-0.03, -0.06):
        levels, standing = advance(standing, {"all/x": change(-0.03, 0.003)}, -0.03)
        assert levels["all/x"] == pytest.approx(expected, abs=0.005)
    levels, standing = advance(standing, {"all/x": change(0.10, 0.003)}, 0.10)
    assert levels["all/x"] > 0 and standing["all/x"] == Reach()


def test_what_is_better_on_the_whole_but_worse_in_one_domain_fails() -> None:
    before = replayed(40, 30) + replayed(12, 30, domain="code", first=100)
    after = more(before[:40], 12) + more(before[40:], -12)
    judgement = judge(before, after)
    assert judgement.overall.ci_low > 0
    assert judgement.verdict == FAIL and "in code" in judgement.reason
    assert judgement.by_domain["code"][1] == FAIL and judgement.by_domain["chat"][1] == PASS
    wide = GateSettings(domain_margin=0.5)
    assert judge(before, after, settings=wide).verdict == PASS


def test_sampled_requests_of_a_large_domain_are_a_stratum_of_their_own() -> None:
    before = replayed(60, 30)
    sampled = [replace(r, accept_rule="target_sampling", request_id=500 + r.request_id)
               for r in before[:20]]  # fmt: skip
    after = more(before, 8) + more(sampled, -12)
    judgement = judge(before + sampled, after)
    assert judgement.verdict == FAIL and "chat (sampled)" in judgement.reason
    assert set(judgement.strata) == {"all/chat", "greedy/chat", "sampled/chat"}
    assert len(pairs_of(before, more(before, 8))) == 60


def test_twenty_domains_that_all_gain_pass_and_one_that_falls_does_not() -> None:
    rng = np.random.default_rng(3)
    longer = np.full(20, 0.05)
    fallen = longer.copy()
    fallen[5] = -0.30
    better = [Live(MANY, HELD_OUT).judge(rng, longer).verdict for _ in range(10)]
    worse = [Live(MANY, HELD_OUT).judge(rng, fallen).verdict for _ in range(10)]
    assert better.count(PASS) >= 6 and worse.count(PASS) <= 2


def test_equal_versions_do_not_pass_by_being_tried_often() -> None:
    rng = np.random.default_rng(4)
    for requests in (6, 40):
        lines = [Live(Mix(), requests) for _ in range(12)]
        verdicts = [live.judge(rng, 0.0).verdict for live in lines for _ in range(12)]
        assert verdicts.count(PASS) <= 2


def test_promotions_that_each_lose_a_little_in_a_domain_come_to_an_end() -> None:
    rng = np.random.default_rng(5)
    promotions, left = ten_promotions(rng, loss=0.045)
    assert 1 <= promotions <= 6 and left > 0.75
