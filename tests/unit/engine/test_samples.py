"""Case "``n: 3`` with ``rid: "mine"``": three requests under the client's id, and none for the
prompt that SGLang sends first; the prompt's trace is the first sample's."""

from __future__ import annotations

import asyncio
import copy
import os
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import pytest  # noqa: E402
from sglang.srt.managers.io_struct import GenerateReqInput  # noqa: E402
from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.managers.tokenizer_manager import ServerStatus  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from aurora_sgl import wire  # noqa: E402
from aurora_sgl.engine import front, labels  # noqa: E402
from aurora_sgl.engine.plan import RequestPlan  # noqa: E402
from aurora_sgl.engine.recorder import Recorder  # noqa: E402
from aurora_sgl.engine.request_state import RequestState  # noqa: E402
from aurora_sgl.engine.samples import PATIENCE, Prompts  # noqa: E402
from aurora_sgl.engine.trace_budget import OpenTrace  # noqa: E402


@pytest.fixture(autouse=True)
def server() -> Iterator[None]:
    before = os.environ.get(labels.STAMP_VARIABLE)
    labels.new_stamp()
    yield
    os.environ.pop(labels.STAMP_VARIABLE)
    if before is not None:
        os.environ[labels.STAMP_VARIABLE] = before


def sent(rid: Any, n: int = 3, most: int | None = 8, prompts: int = 1) -> list[SamplingParams]:
    """The sampling parameters that SGLang's front end sends for one request of a client: its own
    order of steps, with its own classes."""
    manager = SimpleNamespace(server_status=ServerStatus.Up)
    text = "p" if prompts == 1 else ["p"] * prompts
    asked = GenerateReqInput(
        rid=rid, text=text, sampling_params={"n": n, "max_new_tokens": most, "temperature": 0}
    )

    def tokenize(manager: Any, obj: Any) -> Any:
        return SimpleNamespace(sampling_params=SamplingParams(**obj.sampling_params))

    made: list[SamplingParams] = []

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        front.normalize(GenerateReqInput.normalize_batch_and_arguments, asked)
        alone = asked.is_single
        for each in [asked] if alone else [asked[i] for i in range(prompts)]:
            params = front.create_tokenized_object(tokenize, manager, each).sampling_params
            if alone:
                made.append(params)
                continue
            first = copy.copy(params)
            first.max_new_tokens = 0
            made.extend([first, *(copy.copy(params) for _ in range(n))])

    scope = {"type": "http", "headers": [(b"x-aurora-train", b"yes")]}
    asyncio.run(labels.HeaderMiddleware(serve)(scope, None, None))  # type: ignore[arg-type]
    return made


def said(*given: Any, **change: Any) -> list[labels.Labels]:
    return [labels.take(params) for params in sent(*given, **change)]


def test_the_samples_have_the_clients_rid_and_the_prompt_is_told_apart() -> None:
    first, *samples = said("mine")
    assert first.prompt_of == 8 and len(samples) == 3
    assert {(one.rid, one.prompt_of) for one in samples} == {("mine", None)}
    assert len({one.samples for one in (first, *samples)}) == 1 and first.samples


def test_two_requests_with_one_rid_have_samples_of_their_own() -> None:
    assert said("mine")[0].samples != said("mine")[0].samples
    both = said(["a", "b"], n=2, prompts=2)
    assert [one.rid for one in both] == ["a"] * 3 + ["b"] * 3
    assert len({one.samples for one in both}) == 2


def test_without_a_rid_of_the_client_the_samples_keep_sglangs() -> None:
    assert {one.rid for one in said(None)} == {""}
    assert said(None)[0].prompt_of == 8


@pytest.mark.parametrize(("n", "most"), [(1, 8), (1, 0), (3, 0)])
def test_a_client_that_asks_for_no_tokens_is_recorded(n: int, most: int) -> None:
    assert {one.prompt_of for one in said("mine", n=n, most=most)} == {None}


def test_a_prompt_of_samples_without_a_limit_is_known_too() -> None:
    first, *samples = said("mine", most=None)
    assert first.prompt_of is not None and samples[0].prompt_of is None


@pytest.mark.parametrize("rid", ["\ud83d", "a\x00b", "客服", "x" * 5000])
def test_any_rid_can_be_sent_beside_the_others(rid: str) -> None:
    from sglang.srt.managers.io_struct import msgpack_encode

    params = sent(rid)[1]
    msgpack_encode(params)
    assert len(labels.take(params).rid) <= 128


def test_their_records_have_the_clients_rid() -> None:
    recorder = Recorder(9, train_by_default=True, capture_share=0.0, dp_rank=0)
    rids = []
    for number, one in enumerate(said("mine")[1:]):
        req = Req(f"sglang's own {number}", "", array("q", [1, 2]), SamplingParams())
        state = recorder.begin(req, RequestPlan(True, labels=one), follow=True)
        assert state is not None
        record = recorder.started(req, state)
        assert isinstance(record, wire.RequestStarted)
        rids.append(record.rid)
    assert rids == ["mine"] * 3


# -- the prompt's trace --------------------------------------------------------------------------


class Held:
    """Something that a weak reference can hold."""


def prompt_state(request_id: int = 7) -> RequestState:
    state = RequestState(request_id, True, True, True, 0)
    state.labels = labels.Labels(samples="s", prompt_of=8)
    state.trace = OpenTrace(request_id, 3, True, 100)
    return state


def test_the_first_sample_alone_goes_on_with_the_trace() -> None:
    prompts, state, req = Prompts(), prompt_state(), Held()
    prompts.begin(req, state)
    assert not prompts.claim("s", "early"), "the prompt is still computed"
    prompts.done(state)
    assert [prompts.claim("s", rid) for rid in ("a", "b", "c")] == [True, False, False]
    assert prompts.take("b") is None
    assert prompts.take("a") is state and prompts.take("a") is None
    recorder = Recorder(9, train_by_default=True, capture_share=1.0, dp_rank=0)
    sample = Req("a", "", array("q", [1, 2, 3]), SamplingParams())
    begun = recorder.begin(sample, RequestPlan(True, traced=True), follow=True, prompt=state)
    assert begun is not None and begun.request_id == 7 and begun.trace is state.trace
    assert recorder.running == 1


def test_a_trace_that_broke_off_is_nobodys() -> None:
    prompts, state, req = Prompts(), prompt_state(), Held()
    prompts.begin(req, state)
    prompts.done(state)
    assert state.trace is not None
    state.trace.broken = True
    assert not prompts.claim("s", "a")


def test_prompts_without_samples_are_given_up() -> None:
    now = [0.0]
    prompts = Prompts(lambda: now[0])
    aborted, waiting, claimed = prompt_state(1), prompt_state(2), prompt_state(3)
    for name, state in (("x", aborted), ("y", waiting), ("z", claimed)):
        state.labels = labels.Labels(samples=name, prompt_of=8)
    reqs = [Held() for _ in range(3)]
    for req, state in zip(reqs, (aborted, waiting, claimed), strict=True):
        prompts.begin(req, state)
    prompts.done(waiting)
    prompts.done(claimed)
    assert prompts.claim("z", "rid")
    assert prompts.forget_old() == []
    del reqs, req
    assert prompts.forget_old() == [aborted]
    now[0] = PATIENCE + 1
    assert prompts.forget_old() == [waiting, claimed]
    assert prompts.take("rid") is None
