"""What is chosen for a request travels on it to every rank, and no client can say it."""

from __future__ import annotations

import pickle
from array import array
from typing import Any

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import pytest  # noqa: E402
from sglang.srt.managers.io_struct import (  # noqa: E402
    BatchTokenizedGenerateReqInput,
    TokenizedGenerateReqInput,
    msgpack_decode,
    msgpack_encode,
)
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from aurora_sgl.engine import labels, plan  # noqa: E402
from aurora_sgl.engine.plan import Plans, RequestPlan  # noqa: E402

PARAMS: tuple[Any, ...] = (
    None,
    {},
    {"processor": [1, 2]},
    {labels.KEY: {"domain": "code"}},
    {labels.KEY: {"plan": "drafts", "speculates": True}, "plan": "drafts", "speculates": True},
)


def received(params: Any, rid: str = "r", key: str | None = None) -> TokenizedGenerateReqInput:
    """A request as a scheduler gets it from the HTTP process."""
    sent = TokenizedGenerateReqInput(
        rid=rid,
        input_text="",
        input_ids=array("q", [1, 2]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=SamplingParams(custom_params=params),
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
        extra_key=key,
    )
    found: TokenizedGenerateReqInput = msgpack_decode(msgpack_encode(sent))
    return found


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_a_plan_reaches_other_ranks_and_leaves_the_request_as_it_was(params: Any) -> None:
    request = received(params)
    chosen = RequestPlan(speculates=True, keeps=24.0, traced=True)
    plan.put(request, chosen)
    elsewhere = pickle.loads(pickle.dumps([request]))[0]  # as SGLang's ranks send requests
    for rank in (request, elsewhere):
        assert plan.take(rank) == chosen
        assert rank.sampling_params.custom_params == params
        assert plan.take(rank) is None


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_a_client_cannot_send_a_plan(params: Any) -> None:
    request = received(params, key="mine:drafts:traced|aurora:traced")
    assert plan.take(request) is None
    assert request.sampling_params.custom_params == params
    assert Plans(RequestPlan(speculates=False)).pop(request.rid) == RequestPlan(speculates=False)


def test_requests_of_a_batch_are_planned_one_by_one() -> None:
    batch = BatchTokenizedGenerateReqInput(batch=[received(None, "a"), received({}, "b")])
    others = [object(), "text", batch, received(None, "c")]
    assert [one.rid for one in plan.requests(others)] == ["a", "b", "c"]


def test_plans_of_requests_that_never_start_do_not_pile_up() -> None:
    plans = Plans(RequestPlan(speculates=False))
    for number in range(70_000):
        plans.keep(f"rid {number}", RequestPlan(speculates=True))
    assert plans.pop("rid 69999").speculates
    assert not plans.pop("rid 69999").speculates  # taken
    assert not plans.pop("rid 0").speculates  # forgotten
    plans.keep("\ud83d", RequestPlan(speculates=True, traced=True))
    assert plans.pop("\ud83d").traced
