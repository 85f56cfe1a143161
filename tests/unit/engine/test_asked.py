"""Whatever a client asks for, SGLang's scheduler can read, batch and sample it, or the client gets
one line. SGLang's own classes stand on both sides of the check."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import msgspec  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from sglang.srt.layers import logprob_processor  # noqa: E402
from sglang.srt.managers import io_struct  # noqa: E402
from sglang.srt.managers.io_struct import GenerateReqInput, SessionParams  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from aurora_sgl.engine import asked, front  # noqa: E402
from benchmarks.samplers import probabilities, verified  # noqa: E402

VOCABULARY, WIDTH = 100, 4
MANAGER = SimpleNamespace(
    model_config=SimpleNamespace(vocab_size=VOCABULARY, hidden_size=WIDTH),
    enable_metrics=True,
    metrics_collector=SimpleNamespace(labels={"model_name": "m"}),
    server_status=None,
)
TOKENIZED = msgspec.structs.fields(io_struct.TokenizedGenerateReqInput)


def tokenized(manager: Any, obj: Any, text: str, ids: list[int] | None, embeds: Any = None) -> Any:
    """SGLang's tokenized request, of what the client sent, as its tokenizer manager makes it."""
    session = SessionParams(**obj.session_params) if obj.session_params else None
    return io_struct.TokenizedGenerateReqInput(
        **{f.name: getattr(obj, f.name) for f in TOKENIZED if hasattr(obj, f.name)}
        | {"input_text": text, "mm_inputs": None, "token_type_ids": None}
        | {"input_ids": io_struct.array("q", ids or ()), "input_embeds": embeds}
        | {"sampling_params": verified(obj.sampling_params, VOCABULARY), "session_params": session}
        | {"sampling_logprobs_mode": obj.sampling_logprobs_mode or "selected"}
    )


def sent(**body: Any) -> Any:
    """What reaches the scheduler of a body; raises ``ValueError`` for what is refused."""
    if "input_embeds" not in body:
        body["input_ids"] = [1, 2, 3]
    obj = GenerateReqInput(**body)
    front.normalize(GenerateReqInput.normalize_batch_and_arguments, obj)
    each = obj if obj.is_single else obj[0]
    made = front.create_tokenized_object(
        tokenized, MANAGER, each, "", each.input_ids, each.input_embeds
    )
    return io_struct.msgpack_decode(io_struct.msgpack_encode(made))


def served(**body: Any) -> Any:
    """What reaches the scheduler, after it was batched, sampled, and its logprobs were taken."""
    return taken_by_the_scheduler(sent(**body))


def taken_by_the_scheduler(request: Any) -> Any:
    chances = probabilities(request.sampling_params, VOCABULARY)
    assert torch.isfinite(chances).all() and torch.allclose(chances.sum(-1), torch.ones(2))
    torch.multinomial(chances, 1)
    logprob_processor.get_top_logprobs(chances, [request.top_logprobs_num, 1])
    logprob_processor.get_token_ids_logprobs(chances, [request.token_ids_logprob, None])
    hash((request.sampling_params.json_schema, request.sampling_params.regex))
    assert request.logprob_start_len >= -1
    return request


def sampling(**values: Any) -> dict[str, Any]:
    return {"sampling_params": values}


REFUSED: tuple[dict[str, Any], ...] = (
    *(sampling(min_new_tokens=1, stop_token_ids=[id]) for id in (999_999, -1, 1 << 80)),
    *(sampling(stop_token_ids=ids) for ids in (5, "a", [math.nan], [math.inf], [[1]], ["x"])),
    *(sampling(logit_bias={"5": value}) for value in ("abc", "5", None, [1], math.nan, math.inf)),
    *(sampling(logit_bias={"5": value}) for value in (10**400, -(10**400))),
    *(sampling(logit_bias={key: 1.0}) for key in ("100", "-1", "abc", "1.5")),
    *(sampling(logit_bias=value) for value in ([5], "abc", 5, [[5, 1.0]])),
    *(sampling(max_new_tokens=value) for value in (5.5, "5", [5], -1, math.nan, math.inf, {})),
    *(sampling(min_new_tokens=value) for value in (1.5, "1", -1, math.nan, [1])),
    *(sampling(temperature=value) for value in ("hot", [1], -1, math.nan, math.inf, 10**400, {})),
    *(sampling(**{name: math.nan}) for name in ("top_p", "min_p", "top_k", "repetition_penalty")),
    *(sampling(**{name: value}) for name in ("frequency_penalty", "presence_penalty")
      for value in (math.nan, math.inf, "much", 3, [1])),
    *(sampling(top_k=value) for value in (5.5, 1 << 31, 1 << 80, -2, 0, "5")),
    *(sampling(repetition_penalty=value) for value in (0, -1, 3, math.inf, "much")),
    *(sampling(n=value) for value in ("2", 2.5, [2], 1 << 40)),
    *(sampling(stop=value) for value in (5, [5], [None], {}, {"a": 1}, "\ud83d", ["\udc00"])),
    *(sampling(stop_regex=value) for value in (5, [5], "(", ["a{99999999999}"], "a" * 300)),
    *(sampling(**{name: value}) for name in ("json_schema", "regex", "ebnf", "structural_tag")
      for value in ({"type": "object"}, ["a"], 5, True, "\ud83d")),
    *(sampling(**{name: value}) for name in ("ignore_eos", "skip_special_tokens", "no_stop_trim")
      for value in ("perhaps", [True], {"a": 1})),
    *(sampling(stream_interval=value) for value in ("1", 0.5, [1])),
    *(sampling(beam_width=value) for value in ("2", 1.5, 0, [2])),
    *(sampling(sampling_seed=value) for value in (1 << 63, "1", 0.5)),
    sampling(watermark=5),
    sampling(no_such_parameter=1),
    sampling(regex="a", ebnf="b"),
    {"sampling_params": []},
    {"sampling_params": [{}]},
    {"sampling_params": "greedy"},
    *({"return_logprob": True, "top_logprobs_num": most} for most in (101, 100_000, 1 << 80, -1)),
    *({"return_logprob": True, "top_logprobs_num": odd} for odd in ("5", [5, 5], 5.5, {})),
    *({"return_logprob": True, "logprob_start_len": odd} for odd in (-2, -(1 << 80), [1, 2], "a")),
    *({"return_logprob": True, "token_ids_logprob": ids} for ids in ([100], [-1], [[1]], ["a"])),
    *({"session_params": {"id": "s", **odd}} for odd in
      ({"offset": "a"}, {"offset": 0.5}, {"rid": []}, {"replace": "perhaps"}, {"other": 1},
       {"replace": True}, {"replace": 1, "rid": None})),
    *({"session_params": {"id": odd}} for odd in ([1], {}, 5)),
    *({"input_embeds": rows} for rows in
      ([[0.5]], [[0.5] * 4, [0.5] * 3], [[math.nan] * 4], [[math.inf] * 4], [[0.5, "a", 1, 1]])),
    *({"positional_embed_overrides": odd} for odd in ({}, "a", [1])),
    *({name: [place]} for name in ("multi_item_delimiter_indices", "token_indices_to_pool")
      for place in (3, -1, 1 << 80, "a")),
    *({name: ["a", "b"]} for name in ("bootstrap_host", "lora_id", "custom_logit_processor")),
    {"return_hidden_states": [True, False]},
    {"return_hidden_states": "all"},
    {"sampling_logprobs_mode": "other"},
    {"priority": "high"},
    {"custom_labels": {"tenant": "a"}},
    {"received_time": math.nan},
    {"received_time": math.inf},
)  # fmt: skip


@pytest.mark.parametrize("body", REFUSED, ids=str)
def test_what_would_end_a_process_of_the_server_is_refused_in_one_line(
    body: dict[str, Any],
) -> None:
    with pytest.raises(ValueError) as refused:
        sent(**body)
    text = str(refused.value)
    assert text.strip() and "\n" not in text and len(text) < 400
    text.encode()


#: With what reaches SGLang's samplers of it.
SERVED: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {"temperature": 1.0, "max_new_tokens": 128}),
    ({"temperature": True}, {"temperature": 1.0}),
    ({"temperature": 1}, {"temperature": 1.0}),
    ({"temperature": 1e300}, {"temperature": 1e30}),
    ({"temperature": 1e-300}, {"top_k": 1}),
    ({"temperature": None, "top_k": None, "n": None, "max_new_tokens": None}, {"top_k": 1 << 30}),
    ({"ignore_eos": 1, "skip_special_tokens": 0}, {"ignore_eos": True}),
    ({"ignore_eos": "true", "no_stop_trim": "False"}, {"ignore_eos": True, "no_stop_trim": False}),
    ({"max_new_tokens": 5.0, "min_new_tokens": 2.0}, {"max_new_tokens": 5, "min_new_tokens": 2}),
    ({"max_new_tokens": 1 << 80}, {"max_new_tokens": 2**31 - 1}),
    ({"max_new_tokens": None, "min_new_tokens": 1 << 80}, {"min_new_tokens": 2**31 - 1}),
    ({"top_k": 5.0}, {"top_k": 5}),
    ({"top_k": True}, {"top_k": 1}),
    ({"top_k": (1 << 31) - 1}, {"top_k": (1 << 31) - 1}),
    ({"top_p": 1e-300}, {"top_p": 1e-6}),
    ({"repetition_penalty": 1e-300}, {"repetition_penalty": 1e-20}),
    ({"repetition_penalty": 1e-300, "temperature": 1e-6, "logit_bias": {"5": 1e300}}, {}),
    ({"frequency_penalty": 1e-310, "presence_penalty": -2}, {"presence_penalty": -2.0}),
    ({"stop_token_ids": [5, 999_999, -1]}, {"stop_token_ids": {5}}),
    ({"stop_token_ids": [999_999]}, {"stop_token_ids": None}),
    ({"stop_token_ids": ["5", None, 6.0], "min_new_tokens": 1}, {"stop_token_ids": {5, 6}}),
    ({"logit_bias": {"5": True, "6": 2, "07": -0.5}}, {"logit_bias": {"5": 1, "6": 2, "07": -0.5}}),
    ({"logit_bias": {"5": -math.inf}}, {"logit_bias": {"5": -1e30}}),
    ({"logit_bias": {str(token): -math.inf for token in range(VOCABULARY)}}, {}),
    ({"logit_bias": {"5": 3e38}, "temperature": 0.1}, {"logit_bias": {"5": 1e30}}),
    ({"logit_bias": {}}, {"logit_bias": {}}),
    ({"stop": ["\x00", "客" * 2000, ""]}, {"stop_strs": ["\x00", "客" * 2000, ""]}),
    ({"stop": "a", "is_normalized": True, "stop_str_max_len": -9}, {"stop_strs": ["a"]}),
    ({"stop_token_ids": [1], "is_normalized": True, "min_new_tokens": 1}, {"stop_token_ids": {1}}),
    ({"stop_regex": ["a+", "b"]}, {"stop_regex_strs": ["a+", "b"]}),
    ({"json_schema": "{}", "regex": ""}, {"json_schema": "{}", "regex": None}),
    ({"stream_interval": 2.0, "sampling_seed": True}, {"stream_interval": 2, "sampling_seed": 1}),
    ({"custom_params": {"a": [1, None, "x"], "b": {"c": 0.5}}}, {}),
)


@pytest.mark.parametrize(("given_", "taken"), SERVED, ids=str)
def test_what_sglang_serves_is_served_and_odd_types_are_converted(
    given_: dict[str, Any], taken: dict[str, Any]
) -> None:
    params = served(sampling_params=given_).sampling_params
    assert {name: getattr(params, name) for name in taken} == taken


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ({"return_logprob": True, "top_logprobs_num": 100}, {"top_logprobs_num": 100}),
        ({"return_logprob": True, "token_ids_logprob": [0, 99]}, {"token_ids_logprob": [0, 99]}),
        ({"return_logprob": [True], "top_logprobs_num": [5]}, {"top_logprobs_num": 5}),
        ({"return_logprob": 1, "logprob_start_len": 2.0}, {"return_logprob": True}),
        ({"top_logprobs_num": 100_000, "logprob_start_len": -5}, {"top_logprobs_num": 0}),
        ({"lora_id": "somebody's"}, {"lora_id": None}),
        ({"rid": "mine", "session_params": {"id": "s", "offset": 2.0}}, {"rid": "mine"}),
        ({"session_params": {"id": "s", "replace": True, "rid": "a"}}, {"priority": None}),
        ({"session_params": {"id": "s", "replace": False}}, {"priority": None}),
        ({"token_indices_to_pool": [0, 2]}, {"token_indices_to_pool": [0, 2]}),
        ({"custom_labels": {"model_name": "x"}}, {}),
        ({"return_hidden_states": "last"}, {"return_hidden_states": "last"}),
        ({"input_embeds": [[0.5] * WIDTH] * 2}, {"input_embeds": [[0.5] * WIDTH] * 2}),
        ({"priority": 3, "extra_key": "a"}, {"priority": 3}),
    ],
    ids=str,
)
def test_the_other_fields_of_a_request_are_held_likewise(
    body: dict[str, Any], taken: dict[str, Any]
) -> None:
    request = served(**body)
    assert {name: getattr(request, name) for name in taken} == taken


def test_an_empty_rid_with_which_all_requests_would_be_aborted_gets_another() -> None:
    assert len(sent(rid="").rid) == 32
    assert sent(rid="mine").rid == "mine"


def test_several_samples_are_checked_as_one() -> None:
    assert served(sampling_params={"n": 2.0, "temperature": True}).sampling_params.n == 2
    with pytest.raises(ValueError, match="top_logprobs_num"):
        sent(sampling_params={"n": 2}, return_logprob=True, top_logprobs_num=101)


def test_params_that_pickles_carry_are_refused_where_processes_talk_in_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deep = {"custom_params": {"a": {"b": [{"c": 1}]}}}
    assert asked.sampling(deep) == deep
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", False)
    with pytest.raises(ValueError, match="custom_params"):
        asked.sampling(deep)


numbers = st.floats() | st.integers(-(1 << 80), 1 << 80) | st.integers(-3, 101) | st.booleans()
values = st.recursive(
    st.none() | numbers | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.integers(-1, 101).map(str), inner, max_size=3)
    ),
    max_leaves=4,
)
names = st.sampled_from([f.name for f in msgspec.structs.fields(SamplingParams)])
fields = st.sampled_from(["top_logprobs_num", "logprob_start_len", "token_ids_logprob", "priority"])


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(names.filter(lambda name: name != "custom_params"), values, max_size=4),
    st.dictionaries(fields, values, max_size=2),
)
def test_any_value_of_any_parameter_is_served_or_refused_in_one_line(
    params: dict[str, Any], others: dict[str, Any]
) -> None:
    try:
        request = sent(sampling_params=params, return_logprob=True, **others)
    except ValueError as refused:
        assert str(refused).strip() and "\n" not in str(refused)
        return
    taken_by_the_scheduler(request)


@pytest.mark.parametrize("top_k", [2**31, 1 << 80, -(2**31) - 1])
def test_a_top_k_that_no_sampler_holds_is_refused_in_one_line(top_k: int) -> None:
    with pytest.raises(ValueError, match=r"^top_k must be at most 2147483647; [^\n]*$"):
        asked.check_top_k(top_k)
    for fine in (None, -1, 1, 50, 1 << 30, 2**31 - 1):
        asked.check_top_k(fine)
