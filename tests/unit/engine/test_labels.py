"""Headers reach the scheduler as labels; nobody is learnt from who did not clearly agree."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import pytest  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from sglang.srt.managers.io_struct import (  # noqa: E402
    TokenizedGenerateReqInput,
    msgpack_decode,
    msgpack_encode,
)
from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from aurora_sgl.engine import front, labels  # noqa: E402
from aurora_sgl.engine.consent import NOTICE, NOTICE_SECONDS, UNREADABLE, Consent  # noqa: E402
from aurora_sgl.engine.plan import Plans, RequestPlan  # noqa: E402
from aurora_sgl.engine.recorder import Recorder  # noqa: E402

Headers = list[tuple[bytes, bytes]]


@pytest.fixture(autouse=True)
def server() -> Iterator[None]:
    """A server that was started by the hook that starts one."""
    before = os.environ.get(labels.STAMP_VARIABLE)
    labels.new_stamp()
    yield
    os.environ.pop(labels.STAMP_VARIABLE)
    if before is not None:
        os.environ[labels.STAMP_VARIABLE] = before


def arrived(
    headers: Headers | None, params: Any = None, warmup: bool = False
) -> TokenizedGenerateReqInput:
    """A request as the scheduler gets it; ``headers`` None: through another front end."""
    made = TokenizedGenerateReqInput(
        rid="r",
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
    )

    async def app(scope, receive, send) -> None:
        labels.attach(made.sampling_params, warmup=warmup)

    middleware = labels.HeaderMiddleware(app) if headers is not None else app
    scope = {"type": "http", "headers": headers}
    # In a thread of its own: a browser that other tests drive keeps a loop in this one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, middleware(scope, None, None)).result()
    found: TokenizedGenerateReqInput = msgpack_decode(msgpack_encode(made))
    return found


def said(headers: Headers | None, params: Any = None, warmup: bool = False) -> labels.Labels:
    return labels.take(arrived(headers, params, warmup).sampling_params)


def train(*values: bytes) -> Headers:
    return [(b"x-aurora-train", value) for value in values]


def may_train(headers: Headers | None, by_default: bool, params: Any = None) -> bool:
    recorder = Recorder(1, train_by_default=by_default, capture_share=1.0, dp_rank=0)
    found = said(headers, params)
    assert recorder.may_trace(found) == recorder.may_train(found)
    return recorder.may_train(found)


@pytest.mark.parametrize(
    "value", [b"yes", b"YES", b" true ", b"1", b"\tOn", b"yes, true", b"yes,1"]
)
def test_only_a_clear_yes_is_a_yes(value: bytes) -> None:
    assert may_train(train(value), by_default=False)
    assert may_train(train(value, b"on"), by_default=False)


@pytest.mark.parametrize(
    "value",
    [
        *(b"no", b"No", b"false", b"0", b"off", b"none", b"never", b"opt-out", b"maybe", b"2"),
        *(b"", b" ", b",", b"yes,", b"yes,no", b"no, yes", b"yes no", b"yes;no", b'"yes"'),
        *(b"\xff\xfe", b"yes\xa0", "да".encode(), "yes\u200b".encode(), b"y", b"enabled"),
    ],
)
def test_anything_else_is_a_no_whatever_stands_beside_it(value: bytes) -> None:
    for headers in (train(value), train(value, b"yes"), train(b"yes", value)):
        assert not may_train(headers, by_default=True)


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=3))
def test_no_bytes_but_those_of_a_yes_agree(values: list[bytes]) -> None:
    words = [word.strip().lower() for value in values for word in value.split(b",")]
    agreed = all(word in (b"yes", b"true", b"1", b"on") for word in words)
    assert labels.parse(train(*values))["train"] is agreed


@given(st.lists(st.tuples(st.sampled_from([b"x-aurora-domain", b"x-aurora-"]), st.binary())))
def test_whatever_bytes_come_are_read(headers: Headers) -> None:
    found = labels.parse(headers)
    assert len(str(found.get("domain", ""))) <= labels.MAX_LABEL


@pytest.mark.parametrize("by_default", [True, False])
def test_without_the_header_the_servers_setting_decides(by_default: bool) -> None:
    assert may_train([], by_default) is by_default
    assert may_train([(b"x-aurora-domain", b"code")], by_default) is by_default


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        {"aurora": {"train": True, "domain": "code", "warmup": True}},
        {"aurora": {"train": True, "stamp": "guessed"}},
        {"aurora": {"train": True, "stamp": ""}},
        {"aurora": {"train": True, "stamp": None}},
        {"aurora": "yes"},
    ],
    ids=str,
)
def test_what_came_by_another_door_is_served_as_it_is_and_never_learnt_from(params: Any) -> None:
    assert not may_train(None, True, params)
    request = arrived(None, params)
    assert labels.take(request.sampling_params) == labels.UNKNOWN
    assert labels.UNKNOWN.domain == "default" and not labels.UNKNOWN.warmup
    assert request.sampling_params.custom_params == params
    del os.environ[labels.STAMP_VARIABLE]  # a scheduler that was started without one
    assert not may_train(None, True, {"aurora": {"train": True, "stamp": ""}})
    labels.new_stamp()


def test_a_stamp_of_another_server_is_none() -> None:
    request = arrived(train(b"yes"))
    labels.new_stamp()
    assert labels.take(request.sampling_params) == labels.UNKNOWN


@pytest.mark.parametrize("params", [{"train": True}, {"stamp": "x", "domain": "mine"}, "yes"])
def test_a_clients_own_words_are_not_taken_beside_headers(params: Any) -> None:
    found = said(train(b"no"), {"mine": 1, "aurora": params})
    assert found == labels.Labels(may_train=False)


def test_a_gateway_that_passes_few_headers_takes_ours_under_names_that_it_passes() -> None:
    """Also where both names stand beside each other: one no among them is a no."""
    plain: Headers = [
        (b"X-Aurora-Domain", b"code"),
        (b"x-aurora-train", b"yes"),
        (b"x-aurora-speculate", b"no"),
        (b"x-aurora-conversation", b"c7"),
    ]
    other = [(name.lower().replace(b"x-", b"X-Request-Id-", 1), value) for name, value in plain]
    assert labels.parse(other) == labels.parse(plain) == labels.parse(plain + other)
    assert labels.parse(plain)["train"] is True and labels.parse(plain)["domain"] == "code"
    for half in (plain, other):
        mixed = [*half, (b"x-request-id-aurora-train", b"no"), (b"x-aurora-train", b"yes")]
        assert labels.parse(mixed)["train"] is False
    odd = [(b"x-request-id-train", b"no"), (b"x-request-id", b"aurora-train")]
    assert labels.parse(odd) == labels.parse([])


def test_headers_become_labels() -> None:
    headers = [
        (b"X-Aurora-Domain", b" code "),
        (b"x-aurora-train", b"No"),
        (b"x-aurora-speculate", b"yes"),
        (b"x-aurora-conversation", b"abc"),
        (b"content-type", b"text/plain"),
    ]
    assert said(headers) == labels.Labels("code", "abc", False, True, False)
    assert said([(b"x-aurora-speculate", b"whole")]) == labels.Labels(speculate=True, whole=True)
    assert said([(b"x-aurora-speculate", b"OFF")]) == labels.Labels(speculate=False)
    assert said([(b"x-aurora-speculate", b"perhaps")]) == labels.Labels()
    assert said([]) == labels.Labels()
    assert said([], warmup=True) == said(None, warmup=True) == labels.Labels(warmup=True)


@pytest.mark.parametrize(
    ("value", "domain"),
    [
        ("客服".encode(), "客服"),
        ("👩‍👩‍👧 é".encode(), "👩‍👩‍👧 é"),
        (("客" * 100).encode(), "客" * 64),
        (b"x" * 100, "x" * 64),
        ("café".encode("latin-1"), "café"),
        (b"  ", "default"),
    ],
)
def test_a_domain_is_utf_8_and_as_long_in_every_script(value: bytes, domain: str) -> None:
    assert said([(b"x-aurora-domain", value)]).domain == domain


@pytest.mark.parametrize("params", [None, {}, {"processor": [1, 2]}], ids=str)
def test_sglang_meets_a_clients_parameters_as_they_were_sent_and_no_cycle_of_ours(
    params: Any,
) -> None:
    request = arrived(train(b"yes"), params)
    assert request.sampling_params.custom_params != params
    labels.take(request.sampling_params)
    assert request.sampling_params.custom_params == params
    if params is None:
        gc.disable()
        req = Req("r", "", array("q", [1]), request.sampling_params)
        gone = weakref.ref(req)
        del req
        gc.enable()
        assert gone() is None, "a request is freed when SGLang lets go of it"


def test_labels_hold_for_a_request_for_which_nothing_was_chosen() -> None:
    plans = Plans(RequestPlan(speculates=True))
    assert plans.pop("unheard of").labels == labels.UNKNOWN
    plans.keep_unchosen("r", labels.Labels("code", may_train=True, whole=True, warmup=True))
    assert plans.pop("r") == RequestPlan(
        speculates=True, labels=labels.Labels("code", may_train=True)
    )


def test_a_warm_up_of_sglangs_is_known_in_every_worker_and_nobody_can_claim_one() -> None:
    stamp = os.environ[labels.STAMP_VARIABLE].encode()
    assert said([(labels.WARM_UP.encode(), stamp)]).warmup
    for value in (b"1", b"yes", b"", stamp[:-1], b"\xff"):
        assert not said([(labels.WARM_UP.encode(), value)]).warmup


def test_requests_without_a_stamp_are_counted_logged_once_and_told_for_an_hour(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notices: dict[str, str] = {}
    now = [1000.0]
    consent = Consent(notices, clock=lambda: now[0])
    for headers in ([], train(b"yes"), train(b"no")):
        consent.take(arrived(headers))
    assert (consent.unstamped, notices, caplog.records) == (0, {}, [])
    for _ in range(3):
        assert consent.take(arrived(None)) == labels.UNKNOWN
    assert consent.unstamped == 3 and "3 requests" in notices[NOTICE]
    assert len(caplog.records) == 1
    now[0] += NOTICE_SECONDS - 1
    consent.forget_old()
    assert NOTICE in notices
    now[0] += 1
    consent.forget_old()
    assert notices == {}


@pytest.mark.parametrize(
    ("values", "unreadable"),
    [
        ((b"yes",), False), ((b"No",), False), ((b"yes, no",), False), ((b"yes", b"off"), False),
        ((b"none",), True), ((b"never",), True), ((b"",), True), ((b"no,",), True),
        ((b"yes", b"maybe"), True), ((b"\xff",), True), ("да".encode(), True),
    ],
)  # fmt: skip
def test_a_consent_that_cannot_be_read_is_a_no_and_counted(
    caplog: pytest.LogCaptureFixture, values: Any, unreadable: bool
) -> None:
    notices: dict[str, str] = {}
    consent = Consent(notices)
    headers = train(*((values,) if isinstance(values, bytes) else values))
    for _ in range(2):
        taken = consent.take(arrived(headers))
        assert taken.may_train is (values == (b"yes",)) and taken.unreadable is unreadable
    assert consent.unreadable == 2 * unreadable and consent.unstamped == 0
    assert bool(notices) is bool(caplog.records) is unreadable
    if unreadable:
        assert "2 requests" in notices[UNREADABLE] and "counts as a no" in notices[UNREADABLE]
        assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "ids", [[999_999], [-1], [3, 49_152, 5], [1, -(1 << 70)], [1, None], ["a"]]
)
def test_a_token_that_the_model_does_not_know_is_refused_in_one_line(ids: list[Any]) -> None:
    with pytest.raises(ValueError) as refused:
        front.check_ids(ids, 49_152)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 120


def test_every_token_that_the_model_knows_is_let_through() -> None:
    for ids in ([], [0], [49_151], [0, 49_151], range(49_152)):
        front.check_ids(ids, 49_152)


def test_beside_images_and_with_an_adapter_ids_are_left_to_sglang() -> None:
    manager = SimpleNamespace(
        model_config=SimpleNamespace(vocab_size=10), server_status=None, made=[]
    )

    def original(manager: Any, obj: Any, *args: Any, **kw: Any) -> None:
        manager.made.append(args or kw)

    plain, adapted = SimpleNamespace(), SimpleNamespace(lora_path="a")
    front.create_tokenized_object(original, manager, plain, "", [10], None, object(), None)
    front.create_tokenized_object(original, manager, plain, "", None, [[0.5]])
    front.create_tokenized_object(original, manager, adapted, "", [10], None, None)
    assert len(manager.made) == 3
    for call in (("", [10], None, None), ("", [10])):
        with pytest.raises(ValueError, match="token id 10; this model knows 0 to 9"):
            front.create_tokenized_object(original, manager, plain, *call)
    with pytest.raises(ValueError, match="token id -1"):
        front.create_tokenized_object(original, manager, plain, "", input_ids=[-1], mm_inputs=None)
