"""One odd request, or a part of ours that fails, harms nobody: serving and recording go on."""

from __future__ import annotations

import json
import threading
import time
import uuid
from typing import Any

import httpx
import pytest

from aurora_sgl import store
from aurora_sgl.engine.clean import MAX_TEXT
from aurora_sgl.store import queries
from tests.e2e.conftest import Running, until
from tests.e2e.test_identity import assert_greedy
from tests.e2e.test_records import assert_identities, serve

#: As it stands in the body's JSON, and what the store has: None where SGLang refuses the request.
RIDS = (
    (r"\ud83d", None),  # half an emoji
    (r"tail \udc00", None),
    (r"a\u0000b\u001b[31m", "a\ufffdb\ufffd[31m"),
    ("\\u5ba2 \U0001f469\u200d\U0001f467", "客 \U0001f469\u200d\U0001f467"),
    ("x" * 100_000, "x" * MAX_TEXT),
)


def body(ids: list[int], rid: str, **more: Any) -> bytes:
    sampling = json.dumps({"temperature": 0, "max_new_tokens": 8, **more})
    return f'{{"input_ids": {ids}, "rid": "{rid}", "sampling_params": {sampling}}}'.encode()


def ask(server: Running, content: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}/generate", content=content, headers=headers, timeout=120)


@pytest.mark.parametrize(("sent", "stored"), RIDS, ids=["half", "tail", "control", "emoji", "long"])
def test_an_odd_request_id_is_recorded_cleaned_and_what_follows_as_ever(
    server: Running, prompts: list[list[int]], sent: str, stored: str | None
) -> None:
    answer = ask(server, body(prompts[0], sent))
    assert answer.status_code == (400 if stored is None else 200)
    if stored is not None:
        assert server.request(stored).status == "finished"
    for prompt in prompts[1:3]:
        assert_identities(*serve(server, prompt, max_new_tokens=8))
    assert server.row().counters["dropped_odd"] == 0


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-300},
        {"top_k": (1 << 63) - 1, "temperature": 0.5},
        {"frequency_penalty": 1e-310},
        {"logit_bias": {"5": 1e30}},
        {"stop": ["\u0000", "客" * 2000]},
        {"custom_params": {"aurora": "yes", "\u0000": "\u0000" * 1000}},
    ],
    ids=str,
)
def test_odd_sampling_values_are_recorded_or_refused_and_what_follows_as_ever(
    server: Running, prompts: list[list[int]], sampling: dict[str, Any]
) -> None:
    rid = uuid.uuid4().hex
    answer = ask(server, body(prompts[3], rid, **sampling))
    if answer.status_code == 200:
        assert server.request(rid).status == "finished"
    assert_identities(*serve(server, prompts[4], max_new_tokens=8))


def rows(server: Running, rid: str) -> list[Any]:
    with store.session(server.engine, write=False) as s:
        return list(queries.requests_by_rid(s, rid))


@pytest.mark.parametrize("part", ["started", "step", "finish"])
def test_what_fails_with_one_request_is_told_and_its_neighbour_is_recorded(
    server: Running, prompts: list[list[int]], hugging_face: Any, part: str
) -> None:
    rid = f"break {part} {uuid.uuid4().hex}"
    failures = server.row().counters["failures"]
    answers: list[httpx.Response] = []
    content = body(prompts[5], rid, max_new_tokens=24, ignore_eos=True)
    thread = threading.Thread(target=lambda: answers.append(ask(server, content)))
    thread.start()
    neighbour = serve(server, prompts[6], max_new_tokens=24, ignore_eos=True)
    thread.join()
    assert_identities(*neighbour)
    assert_greedy(hugging_face, prompts[5], answers[0].json()["output_ids"])
    assert_identities(*serve(server, prompts[7], max_new_tokens=8))  # at once, without a pause
    assert [row.status for row in rows(server, rid)] == ([] if part == "started" else ["lost"])
    until(lambda: server.row().counters["failures"] > failures, 10, "the failure to be counted")
    assert "failed" in server.row().notices["failed: recording a request"]


@pytest.mark.parametrize(
    ("part", "name", "statuses"),
    [
        ("prefill", "recording prefills", []),
        ("verify", "recording verify steps", ["lost"]),
        ("results", "recording results", ["lost"]),
        ("before", "recording results", ["lost"]),
        ("shape", "choosing a step's drafts", ["finished"]),
        ("marks", "following draft KV", ["finished"]),
    ],
)
def test_a_part_that_failed_works_again_by_itself_and_nobody_is_stored_as_aborted(
    server: Running,
    prompts: list[list[int]],
    hugging_face: Any,
    part: str,
    name: str,
    statuses: list[str],
) -> None:
    rid = f"break {part} {uuid.uuid4().hex}"
    answer = ask(server, body(prompts[8], rid, max_new_tokens=12))
    assert_greedy(hugging_face, prompts[8], answer.json()["output_ids"])
    until(lambda: f"failed: {name}" in server.row().notices, 10, "the failure to be told")
    until(lambda: not server.row().counters["parts_down"], 30, "the pause to be over")

    def recorded() -> bool:
        """Whether a request is recorded, each of which tries the part again."""
        ordinary = uuid.uuid4().hex
        ids = ask(server, body(prompts[9], ordinary)).json()["output_ids"]
        assert_greedy(hugging_face, prompts[9], ids)
        time.sleep(0.5)
        found = [row.status for row in rows(server, ordinary)]
        assert "aborted" not in found
        return "finished" in found

    until(recorded, 30, "a request that is recorded")
    assert_identities(*serve(server, prompts[10], max_new_tokens=8))
    assert [row.status for row in rows(server, rid)] == statuses
