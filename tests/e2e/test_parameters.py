"""Case "greedy with frequency_penalty, ignore_eos" and case "logprobs with drafts": with each of
SGLang's parameters an answer is the same with drafts and without, alone and beside others."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from sqlalchemy import select

from aurora_sgl import store
from aurora_sgl.engine import one_token
from aurora_sgl.store import queries
from aurora_sgl.store.models import Request
from aurora_sgl.wire import WITHOUT_DRAFTS
from tests.e2e.conftest import Running, until

TOKENS = 14
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}},
          "required": ["name"], "additionalProperties": False}  # fmt: skip
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f>"],
}

#: A use of every sampling parameter that a client can send to this server. Without: ``watermark``
#: and logit processors, for which a server has to be started otherwise (see the unit tests).
USES: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 5},
    "stop": {"stop": [".", "\n"]},
    "stop_token_ids": {"stop_token_ids": [18, 30, 216]},
    "stop_regex": {"stop_regex": "[a-z]{6}"},
    "temperature": {"temperature": 0.0},
    "top_p": {"top_p": 0.3},
    "top_k": {"top_k": 1, "temperature": 0.7},
    "min_p": {"min_p": 0.2},
    "frequency_penalty": {"frequency_penalty": 1.2},
    "presence_penalty": {"presence_penalty": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "min_new_tokens": {"min_new_tokens": 9, "stop_token_ids": [198, 18, 253, 28]},
    "n": {"n": 2},
    "beam_width": {"beam_width": 1},
    "json_schema": {"json_schema": json.dumps(SCHEMA)},
    "regex": {"regex": "[A-Z][a-z ]{20,40}"},
    "ebnf": {"ebnf": 'root ::= ("yes" | "no" | "perhaps ")+'},
    "structural_tag": {"structural_tag": json.dumps(TAG)},
    "ignore_eos": {"ignore_eos": True},
    "skip_special_tokens": {"skip_special_tokens": False},
    "spaces_between_special_tokens": {"spaces_between_special_tokens": False},
    "no_stop_trim": {"no_stop_trim": True, "stop": ["."]},
    "stream_interval": {"stream_interval": 2},
    "logit_bias": {"logit_bias": {"253": 6.0, "28": -100.0}},
    "sampling_seed": {"sampling_seed": 7},
    "custom_params": {"custom_params": {"mine": 1}},
    "all penalties": {
        "frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.2,
        "min_new_tokens": 4,
    },
}  # fmt: skip


def ask(server: Running, ids: list[int], speculate: str, **body: Any) -> Any:
    """The answers to one request to the native endpoint."""
    params = {"temperature": 0, "max_new_tokens": TOKENS, **body.pop("sampling", {})}
    answer = httpx.post(
        f"{server.url}/generate",
        json={"input_ids": ids, "sampling_params": params, **body},
        headers={"x-aurora-speculate": speculate},
        timeout=300,
    )
    assert answer.status_code == 200, (params, answer.text)
    return answer.json()


def ask_all(server: Running, prompts: list[list[int]], speculate: str) -> dict[str, list[Any]]:
    """Every use, eight at a time, so that requests of all kinds are in one batch."""

    def one(numbered: tuple[int, str]) -> list[Any]:
        place, name = numbered
        answers = ask(
            server, prompts[place % len(prompts)], speculate, sampling=USES[name],
            rid=f"{mark}-{name}",
        )  # fmt: skip
        return answers if isinstance(answers, list) else [answers]

    mark = f"{speculate}-{MARK}"
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(USES, pool.map(one, enumerate(USES)), strict=True))


MARK = uuid.uuid4().hex[:8]


@pytest.fixture(scope="module")
def both(
    server: Running, prompts: list[list[int]]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """All answers, without drafts and with them."""
    return ask_all(server, prompts[:6], "no"), ask_all(server, prompts[:6], "yes")


def test_every_parameter_gives_the_same_answer_with_drafts_and_without(both: Any) -> None:
    plain, drafts = both
    for name in USES:
        for one, other in zip(plain[name], drafts[name], strict=True):
            assert one["output_ids"] == other["output_ids"], name
            assert one["text"] == other["text"], name
            reasons = [answer["meta_info"]["finish_reason"] for answer in (one, other)]
            assert reasons[0] == reasons[1], name
            assert one["meta_info"]["spec_num_correct_drafts"] == 0, name
    accepted = Counter(
        {
            name: sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
            for name, answers in drafts.items()
        }
    )
    for name in USES:
        if name in one_token.CHANGED or name == "all penalties":
            assert accepted[name] == 0, name
    assert sum(accepted.values()) > 20, "drafts were accepted for the others"


def test_the_record_says_which_were_served_without_drafts(server: Running, both: Any) -> None:
    for name in USES:
        if name == "n":
            continue
        row = server.request(f"yes-{MARK}-{name}")
        depths = {event["depth"] for event in server.events(row.id)}
        if name in one_token.CHANGED or name == "all penalties":
            assert depths == {0} and not row.speculates, name
            assert set(row.sampling[WITHOUT_DRAFTS].split(", ")) == set(USES[name]) - {
                "stop_token_ids"
            }
        else:
            assert depths - {0} and row.speculates and WITHOUT_DRAFTS not in row.sampling, name


def test_penalties_are_those_of_every_token(
    both: Any, hugging_face: Any, prompts: list[list[int]]
) -> None:
    """Beside Hugging Face's logits, each token penalised by all that came before it."""
    name = "all penalties"
    use, place = USES[name], list(USES).index(name)
    prompt = prompts[:6][place % 6]
    output = both[1][name][0]["output_ids"]
    with torch.no_grad():
        logits = hugging_face(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    for index, token in enumerate(output):
        counts = Counter(output[:index])
        row = logits[index].clone()
        for before, count in counts.items():
            row[before] -= use["frequency_penalty"] * count + use["presence_penalty"]
            factor = use["repetition_penalty"]
            row[before] = row[before] * factor if row[before] < 0 else row[before] / factor
        best = float(row.max())
        assert best - float(row[token]) < 1e-3, (index, token, int(row.argmax()))


# -- log-probabilities ---------------------------------------------------------------------------


def close(one: Any, other: Any) -> bool:
    """Whether two nested answers are the same but for rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 2e-3
    return bool(one == other)


LOGPROBS = ("input_token_logprobs", "output_token_logprobs", "input_top_logprobs",
            "output_top_logprobs", "output_token_ids_logprobs")  # fmt: skip


@pytest.mark.parametrize("penalised", [False, True])
def test_log_probabilities_are_the_same_with_drafts_and_without(
    server: Running, prompts: list[list[int]], penalised: bool
) -> None:
    sampling = {"frequency_penalty": 0.8} if penalised else {}

    def one(numbered: tuple[int, str]) -> Any:
        place, speculate = numbered
        return ask(
            server, prompts[place], speculate, sampling=sampling, return_logprob=True,
            logprob_start_len=2, top_logprobs_num=3, token_ids_logprob=[5, 253],
        )  # fmt: skip

    asked = [(place, speculate) for place in range(2) for speculate in ("no", "yes")]
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(asked, pool.map(one, asked), strict=True))
    for place in range(2):
        plain, drafts = answers[place, "no"], answers[place, "yes"]
        assert plain["output_ids"] == drafts["output_ids"]
        assert (drafts["meta_info"]["spec_num_correct_drafts"] == 0) is penalised
        for name in LOGPROBS:
            mine, theirs = plain["meta_info"][name], drafts["meta_info"][name]
            assert len(mine) == len(theirs) > 0, name
            assert close(mine, theirs), (name, mine, theirs)
        assert [token for _, token, _ in drafts["meta_info"]["output_token_logprobs"]] == drafts[
            "output_ids"
        ]


def test_log_probabilities_of_a_chat_are_the_same_with_drafts_and_without(server: Running) -> None:
    def one(speculate: str) -> Any:
        body = {
            "model": "m", "messages": [{"role": "user", "content": "Name three rivers in Europe."}],
            "temperature": 0, "max_tokens": TOKENS, "logprobs": True, "top_logprobs": 3,
        }  # fmt: skip
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json=body, timeout=300,
            headers={"x-aurora-speculate": speculate},
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    plain, drafts = one("no"), one("yes")
    assert plain["message"]["content"] == drafts["message"]["content"]
    assert len(plain["logprobs"]["content"]) == TOKENS
    assert close(plain["logprobs"]["content"], drafts["logprobs"]["content"])


# -- several samples -----------------------------------------------------------------------------


def test_three_samples_are_three_requests_under_the_clients_rid(server: Running) -> None:
    """Case "``n: 3`` with ``rid: "mine"``"."""
    prompt = [1, *range(3000, 3039)]  # which no other test asks, so that nothing of it is cached
    rid, domain = f"mine-{MARK}", f"samples-{MARK}"
    answers = httpx.post(
        f"{server.url}/generate",
        json={"input_ids": prompt, "rid": rid,
              "sampling_params": {"n": 3, "temperature": 0, "max_new_tokens": 6}},
        headers={"x-aurora-domain": domain, "x-aurora-train": "yes"},
        timeout=300,
    ).json()  # fmt: skip
    assert len(answers) == 3

    def ended() -> list[Any] | None:
        with store.session(server.engine, write=False) as s:
            rows = list(s.scalars(select(Request).where(Request.domain == domain)))
            return rows if len(rows) >= 3 and all(r.status == "finished" for r in rows) else None

    rows = until(ended, 30, "the samples in the store")
    assert [(row.rid, row.completion_tokens, row.prompt_tokens) for row in rows] == [
        (rid, 6, len(prompt))
    ] * 3
    with store.session(server.engine, write=False) as s:
        assert len(queries.requests.requests_by_rid(s, rid)) == 3

    def starts() -> list[int] | None:
        with store.session(server.engine, write=False) as s:
            found = queries.requests.recent_requests(s, server.group_id, domains=[domain])
            return sorted(one.start for one in found) if len(found) == 3 else None

    first, *others = until(starts, 30, "traces of the samples")
    # What SGLang computed for the prompt alone is in the first sample's trace, and nowhere else.
    assert first < len(prompt) - 2 <= min(others)
