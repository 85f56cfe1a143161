"""What the store says of a request agrees with SGLang's own counters, whatever happens to it."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.sequences.trace_reader import read_trace
from aurora_sgl.store import queries
from tests.e2e.conftest import Running, until
from tests.e2e.test_identity import assert_greedy


def serve(server: Running, ids: list[int], headers: dict[str, str] | None = None, **sampling: Any):
    """(SGLang's answer, the store's row, the store's verify steps) of one request."""
    rid = uuid.uuid4().hex
    body = {"input_ids": ids, "rid": rid, "sampling_params": {"temperature": 0, **sampling}}
    answer = httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=300)
    assert answer.status_code == 200, answer.text
    row = server.request(rid)
    return answer.json(), row, server.events(row.id)


def assert_identities(answer: dict[str, Any], row: Any, steps: list[dict[str, Any]]) -> None:
    info = answer["meta_info"]
    accepted = [step["accepted"] for step in steps]
    assert row.verify_steps == len(steps) == info["spec_verify_ct"]
    assert row.accepted == sum(accepted) == info["spec_num_correct_drafts"]
    assert row.proposed == sum(step["proposed"] for step in steps)
    histogram = Counter(accepted)
    assert [histogram[i] for i in range(len(info["spec_correct_drafts_histogram"]))] == info[
        "spec_correct_drafts_histogram"
    ]
    assert sum(histogram.values()) == row.verify_steps
    assert sum(i * n for i, n in histogram.items()) == row.accepted
    kept = sum(step["kept"] for step in steps)
    assert row.completion_tokens == info["completion_tokens"] == 1 + row.retractions + kept
    cut = sum(1 + step["accepted"] - step["kept"] for step in steps)
    assert row.completion_tokens == 1 + row.retractions + row.verify_steps + row.accepted - cut
    assert all(step["kept"] <= 1 + step["accepted"] for step in steps)
    assert all(step["kept"] == 1 + step["accepted"] for step in steps[:-1])


def accepted_path(step: dict[str, Any]) -> tuple[int, list[int]]:
    """(the last accepted node, the step's tokens up to the bonus token), checked on the way."""
    node, run = 0, []
    for child in step["accepted_nodes"]:
        assert step["draft_parents"][child - 1] == node
        assert step["draft_tokens"][child - 1] == step["target_tokens"][node]
        run.append(step["draft_tokens"][child - 1])
        node = child
    return node, [*run, step["target_tokens"][node]]


def test_identities_hold_and_agree_with_sglangs_counters(
    server: Running, prompts: list[list[int]]
) -> None:
    drafts = 0
    for prompt in prompts[:8]:
        answer, row, steps = serve(server, prompt, max_new_tokens=24)
        assert_identities(answer, row, steps)
        assert row.status == "finished" and row.prompt_tokens == len(prompt)
        drafts += row.accepted
    assert drafts > 0


def test_the_answer_can_be_read_off_its_verify_steps(
    server: Running, prompts: list[list[int]]
) -> None:
    """Tree, accepted path, first rejection and the target's tokens, against the answer itself."""
    for prompt in prompts[3:6]:
        answer, _, steps = serve(server, prompt, max_new_tokens=24)
        written = answer["output_ids"][:1]
        for number, step in enumerate(steps):
            assert step["step"] == number
            assert step["position"] == len(prompt) + len(written)
            assert step["nodes"] == 8 and step["topk"] == 4 and step["depth"] == 3
            assert step["accept_rule"] == "greedy"
            assert len(step["draft_tokens"]) == len(step["draft_parents"]) == 7
            node, run = accepted_path(step)
            children = [
                token
                for token, parent in zip(step["draft_tokens"], step["draft_parents"], strict=True)
                if parent == node
            ]
            assert step["target_tokens"][node] not in children  # all of them were rejected
            assert step["first_rejected_at"] == (step["accepted"] + 1 if children else 0)
            written += run[: step["kept"]]
        assert written == answer["output_ids"]


def test_a_request_that_ends_at_its_first_token_is_recorded_without_steps(
    server: Running, prompts: list[list[int]]
) -> None:
    _, row, steps = serve(server, prompts[0], max_new_tokens=1)
    assert (row.completion_tokens, row.verify_steps, steps) == (1, 0, [])
    assert row.status == "finished"


def test_domain_consent_and_sampling_reach_the_store(
    server: Running, prompts: list[list[int]]
) -> None:
    headers = {"x-aurora-domain": "poems", "x-aurora-train": "no"}
    _, row, _ = serve(server, prompts[4], headers, max_new_tokens=8, temperature=0.7, top_p=0.9)
    assert (row.domain, row.may_train, row.traced) == ("poems", False, False)
    assert row.sampling["temperature"] == 0.7 and row.sampling["top_p"] == 0.9
    _, other, _ = serve(server, prompts[5], max_new_tokens=8)
    assert (other.domain, other.may_train) == ("default", True)
    until(lambda: _trace(server, other.id), 60, "the trace")  # written after its request
    with store.session(server.engine, write=False) as s:
        assert queries.traces.trace(s, row.id) is None
    assert server.request(other.rid).traced and not server.request(row.rid).traced


def _trace(server: Running, request_id: int) -> Any:
    with store.session(server.engine, write=False) as s:
        return queries.traces.trace(s, request_id)


def read(server: Running, request_id: int) -> Any:
    """The trace file of a request."""
    found = until(lambda: _trace(server, request_id), 60, "the trace")
    path = ArtifactRoot(str(server.home / "artifacts")).local_path(found.uri)
    return read_trace(path, start=found.start)


def test_sampled_requests_are_marked_as_accepted_by_the_targets_sample(
    server: Running, prompts: list[list[int]]
) -> None:
    answer, row, steps = serve(server, prompts[6], max_new_tokens=16, temperature=1.0)
    assert {step["accept_rule"] for step in steps} == {"target_sampling"}
    assert_identities(answer, row, steps)
    written = answer["output_ids"][:1]
    for step in steps:
        assert len(step["target_tokens"]) == step["accepted"] + 1
        written += step["target_tokens"][: step["kept"]]
    assert written == answer["output_ids"]


def test_a_request_that_is_aborted_in_mid_stream_is_closed_and_leaves_the_server_well(
    server: Running, prompts: list[list[int]], hugging_face: Any
) -> None:
    rid = uuid.uuid4().hex
    body = {
        "input_ids": prompts[1],
        "rid": rid,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True},
    }
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as stream:
        for _ in zip(range(5), stream.iter_lines(), strict=False):
            pass
    row = server.request(rid)
    assert row.status == "aborted"
    assert row.verify_steps == len(server.events(row.id)) > 0
    answer = server.generate(prompts[1], max_new_tokens=8)
    assert_greedy(hugging_face, prompts[1], answer["output_ids"])


def test_requests_that_are_retracted_keep_their_tokens_and_their_identities(
    server: Running, prompts: list[list[int]], hugging_face: Any
) -> None:
    def one(prompt: list[int]) -> tuple[list[int], Any]:
        return prompt, serve(server, prompt, max_new_tokens=96, ignore_eos=True)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, prompts[8:16]))
    assert sum(answer["meta_info"]["num_retractions"] for _, (answer, _, _) in results) > 0
    for prompt, (answer, row, steps) in results:
        assert row.retractions == answer["meta_info"]["num_retractions"]
        assert_identities(answer, row, steps)
        assert_greedy(hugging_face, prompt, answer["output_ids"])


def test_a_trace_holds_every_position_through_chunks_and_decoding(
    server: Running, hugging_face: Any, prompts: list[list[int]]
) -> None:
    """A prompt of four chunks. The last state must give the served tokens, the auxiliary states
    must be what Hugging Face computes."""
    prompt = [token for some in prompts[10:15] for token in some][:200]
    httpx.post(f"{server.url}/flush_cache", timeout=30)
    answer, row, _ = serve(server, prompt, max_new_tokens=20)
    trace = read(server, row.id)
    output = answer["output_ids"]
    assert trace.tokens.tolist() == prompt + output
    assert trace.start == 0
    assert trace.aux.shape[0] == trace.last.shape[0] >= len(prompt) + len(output) - 1
    with torch.no_grad():
        wanted = hugging_face(torch.tensor([prompt + output]), output_hidden_states=True)
        logits = trace.last.float() @ hugging_face.lm_head.weight.T
    rows = len(prompt) + len(output) - 1
    assert logits[len(prompt) - 1 : rows].argmax(-1).tolist() == output
    layers = [2, 15, 27]  # of 30, as SGLang chooses: 2, N // 2, N - 3
    aux = torch.cat([wanted.hidden_states[layer][0, :rows] for layer in layers], -1)
    error = (trace.aux[:rows].float() - aux).norm() / aux.norm()
    assert error < 1e-3


def test_a_warm_radix_cache_leaves_a_hole_that_another_trace_fills(
    server: Running, prompts: list[list[int]], model: Any
) -> None:
    from aurora_sgl.drafter.architectures import read_config
    from aurora_sgl.sequences import dataset
    from aurora_sgl.sequences.trace_cache import TraceFiles

    shared = prompts[0][:-4] + prompts[7]
    serve(server, shared + prompts[2][-6:], max_new_tokens=6)
    _, second, _ = serve(server, shared + prompts[9][-6:], max_new_tokens=6)
    assert second.cached_tokens >= len(shared) - 8
    trace = read(server, second.id)
    assert trace.start == second.cached_tokens
    with store.session(server.engine, write=False) as s:
        rows = queries.requests.recent_requests(s, server.group_id, limit=500)
        live = queries.versions.version(s, server.live_version())
    root = ArtifactRoot(str(server.home / "artifacts"))
    config = read_config(root.local_path(live.weights_uri))
    built = dataset.build(
        [row for row in rows if row.request_id == second.id],
        TraceFiles(root, server.home / "cache"),
        config,
        dev_share=0.0,
        gate_share=0.0,
        donors=rows,
    )
    assert len(built.train) == 1 and not built.left_out
    assert built.train[0].rows >= len(shared) + 6


def test_a_grammar_can_cut_what_is_kept_and_such_requests_are_not_learnt_from(
    server: Running, prompts: list[list[int]]
) -> None:
    answer, row, steps = serve(server, prompts[13], max_new_tokens=24, regex="(yes|no), because")
    assert answer["text"] in ("yes, because", "no, because")
    assert row.sampling["grammar"] is True
    assert row.verify_steps == len(steps)
    assert row.completion_tokens == 1 + sum(step["kept"] for step in steps)
    assert all(step["kept"] <= 1 + step["accepted"] for step in steps)


def test_warm_ups_and_health_checks_are_no_requests(server: Running) -> None:
    def finished() -> int:
        with store.session(server.engine, write=False) as s:
            return queries.requests.count_finished(s, server.group_id)

    before = finished()
    for _ in range(2):
        assert httpx.get(f"{server.url}/health_generate", timeout=60).status_code == 200
    server.request(server.generate([1, 2, 3], max_new_tokens=2)["meta_info"]["id"])
    assert finished() == before + 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_openai_endpoints_stream_and_are_recorded(server: Running, path: str) -> None:
    rid = uuid.uuid4().hex
    body: dict[str, Any] = {"model": "m", "max_tokens": 12, "stream": True, "rid": rid}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "Say hello."}]
    else:
        body["prompt"] = "Once upon a time"
    headers = {"x-aurora-domain": "openai"}
    text = ""
    with httpx.stream(
        "POST", f"{server.url}{path}", json=body, headers=headers, timeout=120
    ) as stream:
        assert stream.status_code == 200
        for line in stream.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                choices = json.loads(line[6:])["choices"]
                for choice in choices:
                    text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    assert text
    assert server.request(rid).domain == "openai"
