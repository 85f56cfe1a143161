"""Which drafts a step carries: what requests asked for, what is worth it, and what a server can."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import msgspec  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import zmq  # noqa: E402

from aurora_sgl import environment, wire  # noqa: E402
from aurora_sgl.config import get_settings  # noqa: E402
from aurora_sgl.draft_shape import NO_DRAFT, DraftShape  # noqa: E402
from aurora_sgl.engine import labels, plan, plugin  # noqa: E402
from aurora_sgl.engine.agent import ALONE_SECONDS, Agent  # noqa: E402
from aurora_sgl.engine.herald import Herald  # noqa: E402
from aurora_sgl.engine.request_state import RequestState  # noqa: E402
from aurora_sgl.engine.swap_driver import SwapDriver  # noqa: E402
from aurora_sgl.engine.trace_budget import TOKEN_BYTES  # noqa: E402

labels.new_stamp()
WHOLE = DraftShape(3, 4, 8)


def agent(drafter: torch.nn.Module | None = None, **change: Any) -> Agent:
    """An agent beside a worker of SGLang's that makes no step, without a sidecar."""
    return Agent(*worker(drafter, **change), leads=True)


def worker(drafter: torch.nn.Module | None = None, **change: Any) -> tuple[Any, dict[str, Any]]:
    """It, and what it is described as."""
    description = {
        "depth": 3, "topk": 4, "nodes": 8, "dp_rank": 0, "tp_size": 1, "device": "cpu",
        "plain_steps_possible": True, "rejection_sampling": False, **change,
    }  # fmt: skip
    if drafter is None:
        drafter = torch.nn.Module()
        drafter.fc = torch.nn.Linear(2, 2)
    stand_in = SimpleNamespace(
        speculative_num_steps=3,
        speculative_num_draft_tokens=8,
        topk=description["topk"],
        device="cpu",
        target_worker=SimpleNamespace(
            model_runner=SimpleNamespace(
                model=torch.nn.Linear(2, 2),
                max_total_num_tokens=64,
                token_to_kv_pool=SimpleNamespace(size=64),
            ),
            model_config=SimpleNamespace(vocab_size=10),
        ),
        draft_worker=SimpleNamespace(
            draft_runner=SimpleNamespace(model=drafter, token_to_kv_pool=SimpleNamespace(size=64)),
            hot_token_id=None,
            draft_attn_backend=SimpleNamespace(speculative_num_steps=3),
            speculative_num_steps=3,
            speculative_num_draft_tokens=8,
        ),
    )
    return stand_in, description


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AURORA_SPECULATION", "auto")
    monkeypatch.delenv("AURORA_ENDPOINT", raising=False)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def batch(*speculates: bool, **change: Any) -> SimpleNamespace:
    states = [RequestState(n, False, each, True, 0, **change) for n, each in enumerate(speculates)]
    return SimpleNamespace(reqs=[SimpleNamespace(_aurora=state) for state in states])


def test_a_batch_without_drafting_requests_makes_a_plain_step() -> None:
    mine = agent()
    assert mine.choose_shape(batch(False, False)) == NO_DRAFT
    assert mine.choose_shape(SimpleNamespace(reqs=[SimpleNamespace()])) == NO_DRAFT


def test_a_batch_with_one_drafting_request_carries_drafts() -> None:
    assert agent().choose_shape(batch(False, True)) != NO_DRAFT


def test_a_request_that_asks_for_whole_drafts_gets_them() -> None:
    assert agent().choose_shape(batch(True, whole=True)) == WHOLE


def test_a_server_that_can_make_no_plain_step_always_carries_whole_drafts() -> None:
    mine = agent(plain_steps_possible=False)
    assert mine.choose_shape(batch(False)) == WHOLE and mine.policy.shapes == (WHOLE,)


@pytest.mark.parametrize(("tp_size", "device"), [(2, "cpu"), (1, "cuda")])
def test_ranks_and_gpus_make_every_step_of_the_whole_shape(tp_size: int, device: str) -> None:
    mine = agent(tp_size=tp_size, device=device)
    assert mine.policy.shapes == (WHOLE,)
    assert mine.choose_shape(batch(True)) == WHOLE


def test_on_one_cpu_a_tree_grows_as_far_as_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_SHAPES", "learned")
    get_settings.cache_clear()
    mine = agent()
    get_settings.cache_clear()
    assert mine.trees is not None and mine.policy.shapes == (WHOLE,)
    assert mine.choose_shape(batch(True, False)) == WHOLE and mine.trees.is_open
    for others in (batch(True, whole=True), batch(False)):
        mine.choose_shape(others)
        assert not mine.trees.is_open


def test_on_one_cpu_smaller_shapes_are_at_hand() -> None:
    mine = agent()
    assert mine.trees is None
    shapes = mine.policy.shapes
    assert shapes[0] == DraftShape(1) and shapes[-1] == WHOLE and len(shapes) > 2


def test_where_drafts_are_not_worth_it_requests_lose_them_but_those_that_try_keep_some() -> None:
    mine = agent()
    mine.policy.keeps = lambda size: False  # type: ignore[method-assign]
    some = batch(True, True)
    some.reqs[1]._aurora.keeps = 2
    assert mine.choose_shape(some) != NO_DRAFT
    assert [req._aurora.speculates for req in some.reqs] == [False, True]
    mine.choose_shape(some)
    assert mine.choose_shape(some) == NO_DRAFT, "after its two steps it loses them too"


@pytest.mark.parametrize(("mode", "share"), [("on", 1.0), ("off", 0.0), ("auto", 0.1)])
def test_the_setting_says_which_share_carries_drafts(
    monkeypatch: pytest.MonkeyPatch, mode: str, share: float
) -> None:
    monkeypatch.setenv("AURORA_SPECULATION", mode)
    get_settings.cache_clear()
    mine = agent()
    assert mine.policy.share == share and mine.policy.by_size is (mode == "auto")


def test_a_step_is_counted_under_its_shape() -> None:
    mine = agent()
    mine.account_step(2, shape=WHOLE, seconds=0.01)
    mine.account_step(2, shape=NO_DRAFT, seconds=0.01)
    counters = mine.policy.counters()
    assert (counters["speculative_steps"], counters["plain_steps"]) == (1, 1)
    assert mine.recorder.live.steps_since_swap == 2


def test_within_a_step_its_shape_is_known_and_after_it_the_whole_one() -> None:
    mine = agent()
    with mine.step_shape.set_to(DraftShape(1)):
        assert mine.step_shape.of_step(2) == DraftShape(1)
        assert mine.worker.speculative_num_draft_tokens == 2
    assert mine.step_shape.of_step(8) == WHOLE
    assert mine.worker.speculative_num_draft_tokens == 8


def test_a_chain_that_sglangs_adaptive_mode_shortened_is_told_as_it_was() -> None:
    mine = agent(depth=3, topk=1, nodes=4)
    assert mine.step_shape.of_step(3) == DraftShape(2)
    assert mine.step_shape.of_step(4) == DraftShape(3)


def test_requests_whose_step_was_missed_are_recorded_no_further() -> None:
    mine, some = agent(), batch(True, True)
    for req in some.reqs:
        req._aurora.recorded = True
    mine.let_go_of(some)
    assert not any(req._aurora.recorded for req in some.reqs)


def test_a_part_that_fails_is_told_and_the_step_goes_on() -> None:
    def fail() -> None:
        raise RuntimeError("a mistake of ours")

    mine = agent()
    assert mine.guard("timing steps", fail) is False
    assert len(mine.notices) == 1 and "a mistake of ours" in repr(mine.notices)


# -- requests whose answers drafts would change --------------------------------------------------


def asking(speculate: object = None, **sampling: Any) -> TokenizedGenerateReqInput:
    """A request with penalties, that asks for drafts as it likes."""
    said = {"stamp": os.environ[labels.STAMP_VARIABLE], "speculate": speculate, "whole": True}
    params = SimpleNamespace(custom_params={labels.KEY: said}, max_new_tokens=8, **sampling)
    return received(9, sampling_params=params)


class Prefilled(SimpleNamespace):
    """Something that a weak reference can hold."""


def prefilled(mine: Agent, one: TokenizedGenerateReqInput) -> Any:
    """It, at its first prefill."""
    planned = plan.take(one)
    assert planned is not None
    mine.plans.keep(one.rid, planned)
    req = Prefilled(rid=one.rid, sampling_params=one.sampling_params)
    req.sampling_params.top_k = 1
    mine.begin(SimpleNamespace(reqs=[req]))
    return req


@pytest.mark.parametrize("can_skip", [True, False])
@pytest.mark.parametrize("speculate", [None, True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_penalties_get_no_drafts_whatever_the_header_the_policy_and_the_server_want(
    can_skip: bool, speculate: bool | None, share: float
) -> None:
    mine = agent(plain_steps_possible=can_skip)
    mine.policy.share = share
    one = asking(speculate, frequency_penalty=0.5)
    mine.choose([one])
    req = prefilled(mine, one)
    state = req._aurora
    assert not state.speculates and not state.whole and state.no_drafts == ("frequency_penalty",)
    alone = SimpleNamespace(reqs=[req])
    shape = mine.choose_shape(alone)
    assert shape == (NO_DRAFT if can_skip else WHOLE)
    links = torch.tensor([[1, 2, -1], [1, 2, -1]])
    verified = SimpleNamespace(draft_token_num=3, retrieve_next_token=links)
    other = batch(True).reqs[0]
    mine.no_drafts.withhold(SimpleNamespace(reqs=[other, req]), verified)
    assert verified.retrieve_next_token.tolist() == [[1, 2, -1], [-1, -1, -1]]
    assert mine.notices == {} and mine.parts.failures == 0


def test_beside_requests_that_draft_the_step_keeps_its_drafts() -> None:
    mine = agent()
    one = asking(True, min_new_tokens=4)
    mine.choose([one])
    req = prefilled(mine, one)
    both = SimpleNamespace(reqs=[req, *batch(True).reqs])
    assert mine.choose_shape(both) != NO_DRAFT


def test_a_server_that_can_leave_nobody_out_says_so() -> None:
    mine = agent(plain_steps_possible=False, rejection_sampling=True)
    some = [asking(None, presence_penalty=1.0), asking(None, repetition_penalty=1.1)]
    mine.choose(some)
    req = prefilled(mine, some[1])
    assert req._aurora.speculates and req._aurora.no_drafts == ()
    assert "2 requests had drafts that may change their answers" in mine.notices["drafts"]
    assert "repetition_penalty" in mine.notices["drafts"]


# -- a start at which something is wrong ---------------------------------------------------------


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[zmq.Socket[bytes]]:
    """A sidecar's end of the records, and the variables of a server that has one."""
    monkeypatch.setenv(environment.ENDPOINT, str(tmp_path))
    monkeypatch.setenv(environment.NOTICES, json.dumps({"data folder": "It is full."}))
    (tmp_path / "0").mkdir()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PULL)
    socket.rcvtimeo = 10_000
    socket.bind(f"ipc://{tmp_path / '0' / 'records'}")
    yield socket
    context.destroy(linger=0)


def quantised() -> torch.nn.Module:
    drafter = torch.nn.Module()
    weight = torch.zeros(2, 2).to(torch.float8_e4m3fn)
    drafter.fc = torch.nn.Module()
    drafter.fc.weight = torch.nn.Parameter(weight, requires_grad=False)
    return drafter


def test_a_quantised_drafter_is_unknown_and_recorded(endpoint: Any) -> None:
    mine = agent(quantised())
    assert "quantised (fc.weight is float8_e4m3fn)" in mine.description["unknown_drafter"]
    assert mine.hello().server["unknown_drafter"] == mine.description["unknown_drafter"]
    assert mine.capture is not None and mine.recorder is not None
    assert mine.hello().notices == {"data folder": "It is full."}


def test_a_checkpoint_of_another_architecture_is_not_even_read(
    endpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the target itself, of which the drafter is a part."""
    monkeypatch.setattr(SwapDriver, "read_back_at_start", lambda *_: pytest.fail("was read"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3NextMTP"]}))
    mine = agent(drafter_path=str(tmp_path))
    assert "architecture Qwen3NextMTP" in mine.description["unknown_drafter"]


def test_where_nothing_can_be_stored_but_records_no_hidden_state_is_captured(
    endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "The artifact root /x can't be written (Not a directory)."
    monkeypatch.setenv(environment.NOTICES, json.dumps({"artifacts": why}))
    mine = agent()
    assert mine.recorder.capture_share == 0.0 and mine.description["unknown_drafter"] == why


def test_a_drafter_with_a_token_map_is_unknown(endpoint: Any) -> None:
    stand_in, description = worker()
    stand_in.server_args = SimpleNamespace(speculative_token_map="map.pt")
    mine = Agent(stand_in, description, leads=True)
    assert "--speculative-token-map" in mine.description["unknown_drafter"]


@pytest.mark.parametrize("why", ["CUDA out of memory\nand more", "the weights lack 'd2t'"])
def test_a_drafter_that_cannot_be_read_back_is_unknown(
    endpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def fail(driver: SwapDriver, folder: Path) -> str:
        raise RuntimeError(why)

    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(SwapDriver, "read_back_at_start", fail)
    mine = agent(drafter_path=str(tmp_path))
    reason = mine.description["unknown_drafter"]
    assert reason == f"it can't be read back: {why.splitlines()[0]}"
    assert "live_sha256" not in mine.description


class EAGLEWorkerV2(SimpleNamespace):
    """The name of SGLang's own."""


class StandaloneWorkerV2(EAGLEWorkerV2):
    """SGLang derives it from that one, and our hooks with it."""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_agent", None)
    monkeypatch.setattr(plugin, "_herald", None)


def test_an_agent_that_cannot_start_is_told_to_the_sidecar_and_requests_go_on(
    endpoint: Any, fresh: None
) -> None:
    broken = EAGLEWorkerV2(server_args=SimpleNamespace(model_path="some/model", port=30000))
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_idle=lambda: False))
    step = partial(plugin._forward_batch_generation, lambda *args, **kw: "tokens", broken, batch)
    assert step(1, new_argument=2) == "tokens" and step() == "tokens"
    for _ in range(500):  # as SGLang's loop does it; the sockets join meanwhile
        assert plugin._pull_raw_reqs(lambda receiver: ["request"], None) == ["request"]
        if endpoint.poll(20):
            break
    envelope = msgspec.msgpack.decode(endpoint.recv(), type=wire.Envelope)
    (hello,) = envelope.records
    assert isinstance(hello, wire.Hello) and hello.server["target_model"] == "some/model"
    assert "The plugin could not start in this server (AttributeError" in hello.notices["agent"]
    assert "the plugin did not start" in hello.server["unknown_drafter"]
    assert hello.notices["data folder"] == "It is full."


def test_each_replica_whose_agent_cannot_start_has_a_name_of_its_own(
    endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt import runtime_context

    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(dp_rank=1))
    broken = EAGLEWorkerV2(server_args=SimpleNamespace(model_path="some/model", port=30000))
    herald = Herald.of(broken, RuntimeError("no"))
    assert herald is not None
    assert herald.description["name"].endswith(":30000/dp1") and herald.description["dp_rank"] == 1


def test_workers_of_another_kind_of_speculation_get_no_agent(endpoint: Any, fresh: None) -> None:
    assert plugin._agent_of(StandaloneWorkerV2()) is None and plugin._herald is None


@pytest.mark.parametrize("channel", [False, True])
def test_the_policy_decides_alone_when_no_sidecar_takes_anything(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, channel: bool
) -> None:
    if channel:
        request.getfixturevalue("endpoint").close()
    mine = agent()
    decisions: list[float] = []
    monkeypatch.setattr(mine.policy, "decide_alone", lambda: decisions.append(1.0))
    mine.poll([])
    assert bool(decisions) is not channel, "a sidecar may be on its way"
    mine._sidecar_heard -= ALONE_SECONDS
    mine.poll([])
    mine.poll([])
    assert len(decisions) == 1, "as often as a sidecar would"


# -- capture -------------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Agent]:
    """An agent with a channel to a sidecar that is not there."""
    monkeypatch.setenv("AURORA_ENDPOINT", str(tmp_path))
    monkeypatch.setenv("AURORA_CAPTURE_REQUEST_BYTES", str(100 * ROW))
    monkeypatch.setenv("AURORA_TRACE_MEMORY_BYTES", str(260 * ROW))
    get_settings.cache_clear()
    mine = agent(
        target_hidden_size=8, aux_layers=[1, 2, 3], dtype="bfloat16", algorithm="EAGLE3",
        drafter_path="",
    )  # fmt: skip
    yield mine
    assert mine.capture is not None
    mine.capture.copier.close()


ROW = 8 * 4 * 2 + TOKEN_BYTES


class TokenizedGenerateReqInput(SimpleNamespace):
    """By its name the agent knows SGLang's."""


def received(prompt: int, answer: int = 10, **change: Any) -> TokenizedGenerateReqInput:
    stamp = {labels.KEY: {"stamp": os.environ[labels.STAMP_VARIABLE]}}
    params = SimpleNamespace(custom_params=stamp, max_new_tokens=answer)
    return TokenizedGenerateReqInput(
        **{
            "rid": "r", "input_ids": array("q", range(prompt)), "extra_key": None,
            "sampling_params": params, "session_id": None, "lora_id": None, **change,
        }
    )  # fmt: skip


def chosen(mine: Agent, *some: TokenizedGenerateReqInput) -> list[plan.RequestPlan | None]:
    mine.choose(list(some))
    return [plan.take(one) for one in some]


def test_requests_are_traced_as_long_as_their_whole_traces_fit(capturing: Agent) -> None:
    some = [received(80), received(80), received(80), received(20, 20)]
    for number, one in enumerate(some):
        one.input_ids[0] = number + 100  # of four conversations
    plans = chosen(capturing, *some)
    assert [one.traced for one in plans if one] == [True, True, False, True]
    assert [bool(one.extra_key) for one in some] == [True, True, False, True]
    assert capturing.parts.failures == 0
    counters = capturing.hello().counters
    assert counters["traces_admitted"] == 3 and counters["traces_refused_memory"] == 1
    assert counters["trace_bytes_reserved"] == 220 * ROW and counters["dropped_traces"] == 0


def test_a_turn_that_is_not_traced_stays_where_its_conversation_is(capturing: Agent) -> None:
    turns = [received(40), received(60), received(95), received(98)]
    plans = [chosen(capturing, one)[0] for one in turns]
    # The third does not fit beside the others; a trace of the fourth would have a hole.
    assert [one.traced for one in plans if one] == [True, True, False, False]
    assert [one.extra_key for one in turns] == ["|aurora:traced"] * 4
    turns = [received(10, extra_key="theirs") for _ in range(2)]
    capturing.recorder.capture_share = 0.0
    turns[0].input_ids[0] = turns[1].input_ids[0] = 77
    chosen(capturing, *turns)
    assert [one.extra_key for one in turns] == ["theirs", "theirs"]


def test_a_request_whose_trace_broke_off_ends_the_tracing_of_its_conversation(
    capturing: Agent,
) -> None:
    first, second = received(40), received(50)
    (planned,) = chosen(capturing, first)
    assert planned is not None and planned.traced
    state = RequestState(1 << 33, True, True, True, 0, recorded=True, turn=planned.turn)
    capturing.let_go([state])
    (planned,) = chosen(capturing, second)
    assert planned is not None and not planned.traced and second.extra_key == "|aurora:traced"


def test_a_prompt_that_does_not_fit_is_served_and_never_traced(capturing: Agent) -> None:
    (one,) = chosen(capturing, received(101, 1))
    assert one is not None and not one.traced
    assert capturing.hello().counters["traces_refused_long_prompt"] == 1


def test_a_request_without_tokens_of_its_own_is_chosen_for_all_the_same(capturing: Agent) -> None:
    (one,) = chosen(capturing, received(0, 10, input_ids=None))
    assert one is not None and capturing.parts.failures == 0


def test_requests_that_are_recorded_no_further_give_their_bytes_back(capturing: Agent) -> None:
    capture = capturing.capture
    assert capture is not None
    capture.learn_layout(torch.zeros(1, 24).bfloat16(), torch.zeros(1, 8).bfloat16())
    (one,) = chosen(capturing, received(50))
    assert one is not None
    state = RequestState(1 << 33, True, True, True, 0, recorded=True)
    req = SimpleNamespace(origin_input_ids=array("q", range(50)), _aurora=state)
    capture.begin(req, state, one.ticket)
    assert state.trace is not None and capture.budget.reserved == 60 * ROW
    capturing.let_go_of(SimpleNamespace(reqs=[req]))
    deadline = time.monotonic() + 20
    while capture.counters()["trace_bytes_reserved"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert capture.budget.reserved == 0 and capture.dropped == {"lost": 1}
