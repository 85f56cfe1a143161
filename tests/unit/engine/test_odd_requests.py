"""Whatever a client sends, the records of its request can be sent, read and stored."""

from __future__ import annotations

import json
import math
import os
from array import array
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import pytest  # noqa: E402
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_MATCHED_STR, Req  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from aurora_sgl import wire  # noqa: E402
from aurora_sgl.engine import clean, labels  # noqa: E402
from aurora_sgl.engine.conversations import Conversations  # noqa: E402
from aurora_sgl.engine.plan import RequestPlan  # noqa: E402
from aurora_sgl.engine.recorder import Recorder  # noqa: E402

labels.new_stamp()

#: Any code point, lone surrogates and control characters among them.
texts = st.text(st.characters(codec=None), max_size=300) | st.sampled_from(
    ["\ud83d", "\x00", "a" * 5000, "客服", "\u202e\u2028", "👩‍👩‍👧", "", "\udfff\ud800"]
)
numbers = (
    st.floats(allow_nan=True, allow_infinity=True)
    | st.integers(-(1 << 200), 1 << 200)
    | st.sampled_from([math.nan, math.inf, -math.inf, 10**400, -0.0, True, None])
)
anything = st.recursive(
    texts | numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "min_new_tokens",
    "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip


def request(rid: Any, label: Any, session: Any, sampling: dict[str, Any]) -> Req:
    """SGLang's own request, with values that its checks may let through one day."""
    said = {"domain": label, "conversation": label, "stamp": os.environ[labels.STAMP_VARIABLE]}
    params = SamplingParams(custom_params={labels.KEY: said})
    for name, value in sampling.items():
        setattr(params, name, value)
    made = Req("rid", "", array("q", [1, 2, 3]), params)
    made.rid, made.session_id = rid, session
    return made


def records(req: Req) -> tuple[wire.RequestStarted, wire.RequestFinished]:
    """The request's records as the sidecar reads them."""
    recorder = Recorder(9, train_by_default=True, capture_share=1.0, dp_rank=0)
    said = labels.take(req.sampling_params)
    assert said.stamped
    name = str(said.conversation or req.session_id or "")
    turns = Conversations()
    turns.keep(turns.find(req.origin_input_ids, name), traced=True)
    assert turns.wants_trace(turns.find([9], name), 1.0)
    state = recorder.begin(req, RequestPlan(True, labels=said), follow=True)
    assert state is not None
    made = [recorder.started(req, state), recorder.finish(req, state)]
    started, finished = wire.decode_envelope(wire.encode(wire.Envelope(9, 1, made))).records
    assert isinstance(started, wire.RequestStarted)
    assert isinstance(finished, wire.RequestFinished)
    return started, finished


def is_safe(value: Any) -> bool:
    """Whether both databases and every page take it."""
    if isinstance(value, str):
        sound = value.encode() is not None
        return sound and len(value) <= clean.MAX_TEXT and not set(value) & set("\x00\n\x1b\u2028")
    if isinstance(value, dict):
        return all(is_safe(name) and is_safe(item) for name, item in value.items())
    if isinstance(value, list):
        return all(is_safe(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or -(1 << 63) < value < 1 << 63


@settings(max_examples=150, deadline=None)
@given(
    rid=texts,
    label=texts | anything,
    session=texts | st.none(),
    sampling=st.dictionaries(st.sampled_from(SAMPLING), numbers | anything),
    cached=numbers,
    reason=texts,
)
def test_records_of_any_request_are_read_as_they_were_sent(
    rid: str, label: Any, session: Any, sampling: dict[str, Any], cached: Any, reason: str
) -> None:
    req = request(rid, label, session, sampling)
    req.cached_tokens = cached
    req.finished_reason = FINISH_ABORT(reason)
    started, finished = records(req)
    for field in ("rid", "domain", "conversation_hash", "sampling", "cached_tokens"):
        assert is_safe(getattr(started, field)), field
    assert len(started.domain) <= labels.MAX_LABEL
    json.dumps(started.sampling, allow_nan=False)
    assert finished.status == "aborted" and is_safe(finished.finish_reason)
    assert abs(started.cached_tokens) < 1 << 63


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("\ud83d", "\ufffd"),
        ("chat-\udc00-7", "chat-\ufffd-7"),
        ("a\x00b\x1b[31m\n", "a\ufffdb\ufffd[31m\ufffd"),
        ("客服 👩‍👩‍👧 é", "客服 👩‍👩‍👧 é"),
        ("x" * 1000, "x" * clean.MAX_TEXT),
        ("客" * 1000, "客" * clean.MAX_TEXT),
    ],
)
def test_text_keeps_its_characters_but_for_those_that_cannot_be_stored(
    sent: str, kept: str
) -> None:
    req = request(sent, "support", None, {})
    req.finished_reason = FINISH_MATCHED_STR(matched=sent)
    assert records(req)[0].rid == kept


def test_ordinary_sampling_values_are_recorded_as_they_are() -> None:
    given_values = {"temperature": 0.7, "top_k": 1 << 30, "frequency_penalty": 0.5}
    req = request("mine", "support", None, given_values)
    sampling = records(req)[0].sampling
    assert {name: sampling[name] for name in given_values} == given_values


@given(anything | numbers)
@settings(max_examples=100, deadline=None)
def test_numbers_that_no_store_holds_become_ones_that_it_does(value: Any) -> None:
    found = clean.integer(value)
    assert type(found) is int and -(1 << 63) < found < 1 << 63
    if isinstance(value, int) and abs(value) < 1 << 62:
        assert found == value
