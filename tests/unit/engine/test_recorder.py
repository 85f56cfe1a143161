"""From a verify step to its record: the tree, the accepted path, and sums that agree with them."""

from __future__ import annotations

import gc
from array import array
from types import SimpleNamespace
from typing import Any

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import pytest  # noqa: E402
import torch  # noqa: E402
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from aurora_sgl import wire  # noqa: E402
from aurora_sgl.draft_shape import NO_DRAFT, DraftShape  # noqa: E402
from aurora_sgl.engine.draft_tree import (  # noqa: E402
    StepRows,
    VerifyObservation,
    parents_from_links,
)
from aurora_sgl.engine.labels import Labels  # noqa: E402
from aurora_sgl.engine.plan import RequestPlan  # noqa: E402
from aurora_sgl.engine.recorder import Recorder, new_boot_id  # noqa: E402
from aurora_sgl.engine.request_state import (  # noqa: E402
    RequestState,
    describe_sampling,
    is_mixed,
    visible_length,
)

PROMPT = [5, 6, 7]
#: Node 0 has the children 1 and 2, node 1 the child 3.
FIRST_CHILD, NEXT_SIBLING = [1, 3, -1, -1], [-1, 2, -1, -1]
TREE, CHAIN = DraftShape(2, 2, 4), DraftShape(3)


def recorder(**change: Any) -> Recorder:
    return Recorder(9, **{"train_by_default": True, "capture_share": 0.0, "dp_rank": 0, **change})


def request(rid: str = "rid", **sampling: Any) -> Req:
    params = {"temperature": 0.0, "max_new_tokens": 8, **sampling}
    req = Req(rid, "", array("q", PROMPT), SamplingParams(**params))
    req.sampling_params.normalize(None)
    return req


def begin(recorder: Recorder, req: Req, **plan: Any) -> RequestState:
    state = recorder.begin(req, RequestPlan(True, **{"labels": Labels(), **plan}), follow=True)
    assert state is not None
    return state


def observation(shape: DraftShape = TREE, **change: Any) -> VerifyObservation:
    """Two requests in one step of a tree of four nodes."""
    rows = 2
    given: dict[str, Any] = {
        "draft_token": torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]]),
        "first_child": torch.tensor([FIRST_CHILD] * rows),
        "next_sibling": torch.tensor([NEXT_SIBLING] * rows),
        # The first keeps nodes 1 and 3, the second nothing but the root.
        "accept_index": torch.tensor([[0, 1, 3], [4, -1, -1]]),
        "target_predict": torch.tensor([[11, 13, 90, 14], [99, 91, 92, 93]]),
        "shape": shape,
        "version_id": 3,
        "swap_count": 0,
        "swap_age": 5,
        "rule": "target_sampling",
    }
    return VerifyObservation(**{**given, **change})


def plain_observation() -> VerifyObservation:
    return observation(
        NO_DRAFT,
        draft_token=torch.tensor([[10], [20]]),
        first_child=torch.tensor([[-1], [-1]]),
        next_sibling=torch.tensor([[-1], [-1]]),
        accept_index=torch.tensor([[0], [1]]),
        target_predict=torch.tensor([[11], [21]]),
    )


def step(seen: VerifyObservation, accept_lens: list[int]) -> StepRows:
    return StepRows(seen, accept_lens, len(accept_lens))


def test_a_tree_and_what_was_accepted_of_it_are_recorded_as_nodes() -> None:
    mine, req = recorder(), request()
    state = begin(mine, req)
    req.output_ids = [10, 11, 13, 14]
    record = mine.verify_step(step(observation(), [3, 1]), req, state, 0, before=1)
    assert isinstance(record, wire.VerifyStep)
    assert record.draft_tokens == [11, 12, 13] and record.draft_parents == [0, 0, 1]
    assert record.accepted_nodes == [1, 3] and record.accepted == 2 and record.kept == 3
    assert (record.depth, record.topk, record.nodes, record.proposed) == (2, 2, 4, 3)
    assert record.first_rejected_at == 0, "node 3 is a leaf: nothing was rejected"
    assert record.target_tokens == [11, 13, 90, 14]
    assert record.position == len(PROMPT) + 1 and record.batch_size == 2


def test_of_each_request_of_a_batch_its_own_row_is_recorded() -> None:
    mine, req = recorder(), request()
    state = begin(mine, req)
    req.output_ids = [20, 99]
    record = mine.verify_step(step(observation(), [3, 1]), req, state, 1, before=1)
    assert isinstance(record, wire.VerifyStep)
    assert record.draft_tokens == [21, 22, 23] and record.accepted_nodes == []
    assert record.accepted == 0 and record.kept == 1 and record.first_rejected_at == 1


def test_a_sampled_step_tells_the_tokens_along_the_path_also_past_a_stop() -> None:
    mine, req = recorder(), request(temperature=0.8)
    state = begin(mine, req)
    req.output_ids, req.finished_len = [10, 11, 13, 14], 3
    seen = observation(target_predict=None)
    record = mine.verify_step(step(seen, [3, 1]), req, state, 0, before=1)
    assert isinstance(record, wire.VerifyStep)
    assert record.target_tokens == [11, 13, 14] and record.kept == 2
    assert record.accept_rule == "target_sampling"


TOKENS = ("draft_tokens", "draft_parents", "accepted_nodes", "target_tokens")


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("may_train", "by_default", "kept", "tokens"),
    [
        (False, True, False, False),
        (None, False, False, False),
        (False, True, True, True),
        (True, False, False, True),
        (None, True, False, True),
    ],
)
def test_of_opted_out_requests_there_are_counts_and_no_tokens(
    may_train: bool | None, by_default: bool, kept: bool, tokens: bool, sampled: bool
) -> None:
    mine = recorder(train_by_default=by_default, keep_opted_out_tokens=kept)
    req = request(temperature=0.8 if sampled else 0.0)
    state = begin(mine, req, labels=Labels(may_train=may_train))
    req.output_ids = [10, 11, 13, 14]
    seen = observation(**({"target_predict": None} if sampled else {}))
    record = mine.verify_step(step(seen, [3, 1]), req, state, 0, before=1)
    assert isinstance(record, wire.VerifyStep)
    assert (record.proposed, record.accepted, record.kept, record.nodes) == (3, 2, 3, 4)
    assert [bool(getattr(record, name)) for name in TOKENS] == [tokens] * 4


def test_a_row_without_drafts_in_a_step_with_drafts_is_recorded_as_a_plain_one() -> None:
    mine, req = recorder(), request(frequency_penalty=0.5)
    state = begin(mine, req)
    state.go_without_drafts(("frequency_penalty",))
    req.output_ids = [20, 99]
    childless = torch.tensor([FIRST_CHILD, [-1] * 4])
    record = mine.verify_step(
        step(observation(first_child=childless), [3, 1]), req, state, 1, before=1
    )
    assert isinstance(record, wire.VerifyStep)
    assert (record.depth, record.topk, record.nodes, record.proposed) == (0, 1, 1, 0)
    assert (record.accepted, record.kept, record.first_rejected_at) == (0, 1, 0)
    assert (record.draft_tokens, record.draft_parents, record.target_tokens) == ([], [], [99])
    assert state.proposed == 0 and not record.mixed
    started = mine.started(req, state)
    assert isinstance(started, wire.RequestStarted)
    assert started.sampling[wire.WITHOUT_DRAFTS] == "frequency_penalty" and not started.speculates


@pytest.mark.parametrize(
    ("temperature", "sampled", "rule"),
    [
        (0.0, "target_sampling", "greedy"),
        (0.0, "rejection_sampling", "greedy"),
        (0.7, "target_sampling", "target_sampling"),
        (0.7, "rejection_sampling", "rejection_sampling"),
        (0.7, "block_verification", "block_verification"),
    ],
)
def test_the_accept_rule_is_the_requests_and_the_servers(
    temperature: float, sampled: str, rule: str
) -> None:
    mine, req = recorder(), request(temperature=temperature)
    state = begin(mine, req)
    req.output_ids = [10, 11, 13, 14]
    seen = observation(rule=sampled)
    record = mine.verify_step(step(seen, [3, 1]), req, state, 0, before=1)
    assert isinstance(record, wire.VerifyStep) and record.accept_rule == rule


def test_the_sums_of_a_request_are_those_of_its_rows() -> None:
    mine, req = recorder(), request()
    state = begin(mine, req)
    state.recorded = True
    rows, req.output_ids = [], [10]
    for accept_len in (3, 1, 2):
        before = len(req.output_ids)
        req.output_ids = [*req.output_ids, *range(accept_len)]
        rows.append(mine.verify_step(step(observation(), [accept_len, 1]), req, state, 0, before))
    req.finished_reason = FINISH_LENGTH(7)
    end = mine.finish(req, state)
    assert isinstance(end, wire.RequestFinished) and end.status == "finished"
    assert [row.step for row in rows] == [0, 1, 2]
    assert end.verify_steps == 3 and end.accepted == sum(row.accepted for row in rows) == 3
    assert end.proposed == sum(row.proposed for row in rows) == 9
    assert end.completion_tokens == 1 + sum(row.kept for row in rows) == 7
    assert mine.running == 0


def test_drafts_after_a_plain_step_are_made_from_a_cache_with_holes() -> None:
    mine, req = recorder(), request()
    state = begin(mine, req)
    req.output_ids = [10, 11]
    plain = mine.verify_step(step(plain_observation(), [1, 1]), req, state, 0, before=1)
    assert isinstance(plain, wire.VerifyStep)
    assert (plain.depth, plain.nodes, plain.proposed) == (0, 1, 0) and not plain.mixed
    req.output_ids = [10, 11, 12]
    drafted = mine.verify_step(step(observation(), [1, 1]), req, state, 0, before=2)
    assert isinstance(drafted, wire.VerifyStep) and drafted.mixed


def test_a_request_that_began_under_another_version_is_mixed() -> None:
    mine, req = recorder(), request()
    state = begin(mine, req)
    assert not is_mixed(state, observation())
    assert is_mixed(state, observation(swap_count=1))
    state.strangers = torch.tensor([2, 0, 0])
    assert is_mixed(state, observation()), "places of a cached prefix hold another drafter's KV"


@pytest.mark.parametrize(
    ("first_child", "next_sibling", "parents"),
    [
        ([1, 2, 3, -1], [-1, -1, -1, -1], [0, 1, 2]),  # a chain
        ([1, -1, -1, -1], [-1, 2, 3, -1], [0, 0, 0]),  # one level
        (FIRST_CHILD, NEXT_SIBLING, [0, 0, 1]),
        ([1, -1, -1], [-1, -1, -1], [0, -1]),  # node 2 hangs on nothing
        ([-1], [-1], []),  # a step without drafts
    ],
)
def test_links_between_nodes_become_parents(
    first_child: list[int], next_sibling: list[int], parents: list[int]
) -> None:
    assert parents_from_links(first_child, next_sibling) == parents


def test_an_aborted_request_says_so() -> None:
    mine, req = recorder(), request()
    state = begin(mine, req)
    req.finished_reason = FINISH_ABORT("the client is gone")
    end = mine.finish(req, state)
    assert isinstance(end, wire.RequestFinished) and end.status == "aborted"


def test_a_request_that_sglang_forgot_is_ended_once() -> None:
    mine, req = recorder(), request()
    begin(mine, req).recorded = True
    assert mine.vanished() == [] and mine.running == 1
    del req
    gc.collect()
    (end,) = mine.vanished()
    assert isinstance(end, wire.RequestFinished) and end.status == "aborted"
    assert mine.vanished() == [] and mine.running == 0


def test_a_request_that_a_failure_let_go_of_is_neither_finished_nor_aborted() -> None:
    mine, req = recorder(), request()
    state = begin(mine, req)
    assert mine.let_go(state) is None, "nothing of it was recorded yet"
    state.recorded = True
    end = mine.let_go(state)
    assert isinstance(end, wire.RequestFinished) and end.status == "lost"
    assert mine.let_go(state) is None


@pytest.mark.parametrize("rid", ["HEALTH_CHECK_1", "HEALTH_CHECK"])
def test_health_checks_are_no_requests(rid: str) -> None:
    mine = recorder()
    assert mine.begin(request(rid), RequestPlan(True), follow=True) is None and mine.running == 0


def test_warm_ups_are_no_requests() -> None:
    plan = RequestPlan(True, labels=Labels(warmup=True))
    assert recorder().begin(request(), plan, follow=True) is None


def test_a_rank_that_does_not_record_counts_requests_alike() -> None:
    leads, follows = recorder(), recorder()
    for _ in range(3):
        one, other = (
            r.begin(request(), RequestPlan(True), follow=r is leads) for r in (leads, follows)
        )
        assert one is not None and other is not None and one.request_id == other.request_id
    assert (leads.running, follows.running) == (3, 0)


def test_what_a_stop_cut_off_is_not_seen() -> None:
    assert visible_length(SimpleNamespace(finished_len=None, output_ids=[1, 2, 3])) == 3
    assert visible_length(SimpleNamespace(finished_len=2, output_ids=[1, 2, 3])) == 2


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
        ({"frequency_penalty": -0.5}, {"frequency_penalty": -0.5}),
        ({"min_new_tokens": 3}, {"min_new_tokens": 3}),
        ({"logit_bias": {"5": 1.0}}, {"logit_bias": True}),
        ({"regex": "a+"}, {"grammar": True}),
        ({"json_schema": "{}"}, {"grammar": True}),
        ({}, {}),
    ],
)
def test_only_sampling_that_differs_from_the_usual_is_described(
    sampling: dict[str, Any], expected: dict[str, Any]
) -> None:
    req = request()
    for name, value in sampling.items():
        setattr(req.sampling_params, name, value)
    described = describe_sampling(req)
    usual = {"temperature", "top_p", "top_k", "min_p", "max_new_tokens"}
    assert {name: value for name, value in described.items() if name not in usual} == expected
    assert usual <= described.keys()


def test_boots_have_numbers_of_their_own() -> None:
    numbers = {new_boot_id() for _ in range(100)}
    assert len(numbers) == 100 and all(0 < number < 1 << 31 for number in numbers)
