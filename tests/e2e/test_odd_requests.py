"""One odd request, or a part of ours that fails, harms nobody: serving and recording go on."""

from __future__ import annotations

import json
import math
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from aurora_sgl import store
from aurora_sgl.engine.clean import MAX_TEXT
from aurora_sgl.store import queries
from tests.e2e.conftest import Running, until
from tests.e2e.test_records import assert_identities, serve

#: As it stands in the body's JSON, and what the store has: None where SGLang refuses the request.
RIDS = (
    (r"\ud83d", None),  # half an emoji
    (r"tail \udc00", None),
    (r"a\u0000b\u001b[31m", "a\ufffdb\ufffd[31m"),
    ("\\u5ba2 \U0001f469\u200d\U0001f467", "客 \U0001f469\u200d\U0001f467"),
    ("x" * 100_000, "x" * MAX_TEXT),
)
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 1e-300},
    {"top_k": (1 << 31) - 1, "temperature": 0.5},
    {"frequency_penalty": 1e-310},
    {"logit_bias": {"5": 1e30}},
    {"stop": ["\u0000", "客" * 2000]},
    {"custom_params": {"aurora": "yes", "\u0000": "\u0000" * 1000}},
)
#: Beside ids and samplings, each of which ended SGLang's scheduler, detokenizer or front.
REFUSED: tuple[dict[str, Any], ...] = (
    {"sampling_params": {"min_new_tokens": 1, "stop_token_ids": [999_999]}},
    {"sampling_params": {"min_new_tokens": 1, "stop_token_ids": [-1]}},
    {"sampling_params": {"logit_bias": {"5": "abc"}}},
    {"sampling_params": {"logit_bias": {"5": None}}},
    {"sampling_params": {"logit_bias": {"5": math.nan}}},
    {"sampling_params": {"logit_bias": {"5": math.inf}}},
    {"sampling_params": {"max_new_tokens": 5.5}},
    {"sampling_params": {"max_new_tokens": "5"}},
    {"sampling_params": {"temperature": "hot"}},
    {"sampling_params": {"json_schema": {"type": "object"}}},
    {"sampling_params": {"regex": ["a"]}},
    {"sampling_params": {"stream_interval": "1"}, "stream": False},
    {"sampling_params": {"skip_special_tokens": "perhaps"}},
    {"sampling_params": {"n": 1 << 40}},
    {"sampling_params": {"no_such_parameter": 1}},
    {"return_logprob": True, "top_logprobs_num": 100_000},
    {"return_logprob": True, "top_logprobs_num": [5, 5]},
    {"return_logprob": True, "token_ids_logprob": [999_999]},
    {"return_logprob": True, "logprob_start_len": -5},
    {"return_logprob": True, "logprob_start_len": [1, 2]},
    {"session_params": {"id": [1]}},
    {"session_params": {"id": "s", "replace": True}},
    {"positional_embed_overrides": {}},
    {"token_indices_to_pool": [1 << 80]},
    {"lora_id": ["a", "b"]},
)
#: Odd ones that are served: what SGLang's contract for ``/generate`` lets through.
SERVED: tuple[dict[str, Any], ...] = (
    {"temperature": 1, "top_p": 1e-300},
    {"logit_bias": {"5": 1, "6": -3e38}},
    {"stop_token_ids": [999_999, -1]},
    {"temperature": 0.1, "logit_bias": {"5": 3e38}},
    {"repetition_penalty": 1e-300, "temperature": 1e300, "min_new_tokens": 2},
    {"min_new_tokens": None, "stop_token_ids": [5, 999_999], "ignore_eos": None},
)


def ask(server: Running, ids: list[int], rid: str, **sampling: Any) -> httpx.Response:
    """``rid`` as it is to stand in the body."""
    params = json.dumps({"temperature": 0, "max_new_tokens": 8, **sampling})
    content = f'{{"input_ids": {ids}, "rid": "{rid}", "sampling_params": {params}}}'.encode()
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}/generate", content=content, headers=headers, timeout=120)


def post(server: Running, ids: list[int], body: dict[str, Any]) -> httpx.Response:
    """With the numbers that JSON does not have, as Python writes and SGLang reads them."""
    content = json.dumps({"input_ids": ids, **body})
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}/generate", content=content, headers=headers, timeout=120)


def rows(server: Running, rid: str) -> list[Any]:
    with store.session(server.engine, write=False) as s:
        return list(queries.requests.requests_by_rid(s, rid))


def test_odd_request_ids_are_recorded_cleaned_and_what_follows_as_ever(
    server: Running, prompts: list[list[int]]
) -> None:
    for sent, stored in RIDS:
        answer = ask(server, prompts[0], sent)
        assert answer.status_code == (400 if stored is None else 200), sent[:20]
        if stored is not None:
            assert server.request(stored).status == "finished"
    assert_identities(*serve(server, prompts[1], max_new_tokens=8))
    assert server.row().counters["dropped_odd"] == 0


def test_odd_sampling_values_are_recorded_or_refused_and_what_follows_as_ever(
    server: Running, prompts: list[list[int]]
) -> None:
    for sampling in SAMPLING:
        rid = uuid.uuid4().hex
        if ask(server, prompts[3], rid, **sampling).status_code == 200:
            assert server.request(rid).status == "finished", sampling
    assert_identities(*serve(server, prompts[4], max_new_tokens=8))


def test_what_would_end_the_server_gets_a_400_and_the_next_request_is_served(
    server: Running, prompts: list[list[int]]
) -> None:
    wanted = post(server, prompts[1], {"sampling_params": {"temperature": 0, "max_new_tokens": 4}})
    for body in REFUSED:
        answer = post(server, prompts[0], body)
        assert answer.status_code == 400 and answer.text, (body, answer.text)
        after = ask(server, prompts[1], uuid.uuid4().hex, max_new_tokens=4)
        assert after.json()["output_ids"] == wanted.json()["output_ids"], body
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": "any", "prompt": prompts[0], "logprobs": 100_000, "max_tokens": 2},
        timeout=60,
    )
    assert answer.status_code == 400
    assert_identities(*serve(server, prompts[2], max_new_tokens=8))


def test_odd_values_that_a_sampler_can_take_are_served(
    server: Running, prompts: list[list[int]]
) -> None:
    for sampling in SERVED:
        params = {"max_new_tokens": 4, **sampling}
        answer = post(server, prompts[3], {"sampling_params": params})
        assert answer.status_code == 200, (sampling, answer.text)
    assert_identities(*serve(server, prompts[4], max_new_tokens=8))


def test_what_fails_with_one_request_is_told_and_its_neighbours_are_recorded(
    server: Running, prompts: list[list[int]]
) -> None:
    failures = server.row().counters["failures"]
    sampling = {"max_new_tokens": 24, "ignore_eos": True}
    wanted, _, _ = serve(server, prompts[5], **sampling)
    rids = {part: f"break {part} {uuid.uuid4().hex}" for part in ("started", "step", "finish")}
    with ThreadPoolExecutor(4) as pool:
        broken = [pool.submit(ask, server, prompts[5], rid, **sampling) for rid in rids.values()]
        neighbour = pool.submit(serve, server, prompts[6], **sampling).result()
        answers = [one.result().json()["output_ids"] for one in broken]
    assert_identities(*neighbour)
    assert answers == 3 * [wanted["output_ids"]]
    assert_identities(*serve(server, prompts[7], max_new_tokens=8))  # at once, without a pause
    found = {part: [row.status for row in rows(server, rid)] for part, rid in rids.items()}
    assert found == {"started": [], "step": ["lost"], "finish": ["lost"]}
    until(lambda: server.row().counters["failures"] >= failures + 3, 10, "the failures")
    assert "failed" in server.row().notices["failed: recording a request"]


def test_parts_that_failed_work_again_by_themselves_and_nobody_is_stored_as_aborted(
    server: Running, prompts: list[list[int]]
) -> None:
    statuses = {
        "shape": ["finished"],
        "marks": ["finished"],
        "before": ["lost"],
        "results": ["lost"],
        "verify": ["lost"],
        "prefill": [],  # not recorded from its start on
    }
    wanted, _, _ = serve(server, prompts[8], max_new_tokens=12)
    rids = {part: f"break {part} {uuid.uuid4().hex}" for part in statuses}
    for rid in rids.values():
        answer = ask(server, prompts[8], rid, max_new_tokens=12)
        assert answer.json()["output_ids"] == wanted["output_ids"]
    told = {
        f"failed: {name}"
        for name in (
            "choosing a step's drafts",
            "following draft KV",
            "recording results",
            "recording verify steps",
            "recording prefills",
        )
    }
    until(lambda: told <= set(server.row().notices), 10, "the failures to be told")

    def recorded() -> bool:
        """Whether a request is recorded, each of which tries what is left alone again."""
        ordinary = uuid.uuid4().hex
        ask(server, prompts[9], ordinary)
        time.sleep(0.5)
        found = [row.status for row in rows(server, ordinary)]
        assert "aborted" not in found
        return "finished" in found

    until(recorded, 30, "a request that is recorded")
    assert_identities(*serve(server, prompts[10], max_new_tokens=8))
    until(lambda: not server.row().counters["parts_down"], 30, "all pauses to be over")
    assert {part: [row.status for row in rows(server, rid)] for part, rid in rids.items()} == (
        statuses
    )


def test_a_sessions_turns_can_be_replaced_one_by_one_and_not_all_at_once(
    server: Running, prompts: list[list[int]]
) -> None:
    """All at once would end SGLang's scheduler, once the session has a turn."""
    opened = httpx.post(f"{server.url}/open_session", json={"capacity_of_str_len": 1000})
    asked = {"sampling_params": {"temperature": 0, "max_new_tokens": 4}}

    def turn(**params: Any) -> httpx.Response:
        return post(
            server, prompts[0], {**asked, "session_params": {"id": opened.json(), **params}}
        )

    first, wanted = turn(), post(server, prompts[0], asked).json()["output_ids"]
    assert first.json()["output_ids"] == wanted
    refused = turn(replace=True)
    assert refused.status_code == 400 and "replace needs the rid" in refused.text
    again = turn(replace=True, rid=first.json()["meta_info"]["id"])
    assert again.status_code == 200 and len(again.json()["output_ids"]) == 4
    assert_identities(*serve(server, prompts[2], max_new_tokens=8))
