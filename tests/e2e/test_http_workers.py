"""A server with two HTTP workers: what clients say holds in each, whoever can't be heard is not
learnt from, and the server lives and ends as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from aurora_sgl import doctor, store
from aurora_sgl.store import queries
from tests.e2e.conftest import ROOT, Running, start
from tests.support.sidecar_engine import wait_until as until

VOCABULARY = 49_152
REFUSED = "The prompt has the token id {}; this model knows 0 to 49151."
#: A real front end without our middleware: SGLang's Python engine, joined to a running server.
PYTHON_ENGINE = """
import sys
import aurora_sgl.compat
from aurora_sgl.engine import cpu
cpu.install()
from sglang.srt.entrypoints.engine import Engine
engine = Engine.attach_tokenizer_worker(parent_pid=int(sys.argv[1]))
own = {"aurora": {"train": True, "domain": "forged", "warmup": True, "stamp": ""}}
for number in range(2):
    params = {"temperature": 0, "max_new_tokens": 3, "custom_params": own}
    print(engine.generate(input_ids=[5, 6, 7], sampling_params=params, rid=f"engine {number}"))
sys.stdout.flush()
import os
os._exit(0)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Running]:
    running = start(
        tmp_path_factory.mktemp("two-workers"),
        model,
        ROOT / "benchmarks" / "static-drafter",
        dtype="bfloat16",
        flags=("--tokenizer-worker-num", "2"),
    )
    # What reaches a worker before it is through with its own warm-up counts as one.
    log = running.process.log
    until(lambda: log.read_text(errors="replace").count("fired up") >= 2, 60, "both warm-ups")
    yield running
    running.process.stop()
    running.engine.dispose()


def workers(two: Running) -> list[psutil.Process]:
    return [p for p in two.process.family() if "tokenizer_worker" in " ".join(p.cmdline())]


def served_by(two: Running, client: httpx.Client) -> int:
    """The pid of the worker that has this client's connection."""
    mine = client._transport._pool.connections[0]._connection._network_stream  # type: ignore[attr-defined]
    port = mine.get_extra_info("client_addr")[1]
    for worker in workers(two):
        if any(c.raddr and c.raddr.port == port for c in worker.net_connections("tcp")):
            return worker.pid
    raise AssertionError(f"no worker has the connection from port {port}")


@contextmanager
def connected(two: Running, worker: psutil.Process) -> Iterator[httpx.Client]:
    """A client whose connection this worker has: the others can't take it while they stand still,
    and on a busy machine one takes nearly all."""
    others = [one for one in workers(two) if one.pid != worker.pid]
    kept = httpx.Limits(keepalive_expiry=60)
    with httpx.Client(timeout=300, limits=kept) as client:
        for one in others:
            one.suspend()
        try:
            client.get(f"{two.url}/model_info")
        finally:
            for one in others:
                one.resume()
        yield client


def test_headers_hold_in_every_http_worker(two: Running) -> None:
    asked: dict[int, list[int]] = {}
    said = [
        ({b"x-aurora-train": b"no", b"x-aurora-domain": "秘密".encode()}, "秘密", False),
        ({b"x-aurora-train": b"never"}, "default", False),
        ({b"x-aurora-train": b"yes", b"x-aurora-domain": b"open"}, "open", True),
        ({}, "default", True),
    ]
    own = {"aurora": {"train": True, "domain": "forged", "warmup": True}}
    for worker in workers(two):
        with connected(two, worker) as client:
            for place in range(8):
                number, (headers, _, _) = 8 * len(asked) + place, said[place % len(said)]
                params = {"temperature": 0, "max_new_tokens": 4, "custom_params": own}
                body = {"input_ids": [5, 6, 7], "sampling_params": params, "rid": f"w {number}"}
                answer = client.post(
                    f"{two.url}/generate", json=body, headers=list(headers.items())
                )
                assert answer.status_code == 200, answer.text
            assert served_by(two, client) == worker.pid
        asked[worker.pid] = list(range(8 * len(asked), 8 * len(asked) + 8))
    assert len(asked) == 2
    for numbers in asked.values():
        for place, number in enumerate(numbers):
            row = two.request(f"w {number}", 60)
            _, domain, may_train = said[place % len(said)]
            assert (row.domain, row.may_train) == (domain, may_train)
            assert may_train or not row.traced

    def domains() -> set[str]:
        with store.session(two.engine, write=False) as s:
            rows = queries.requests.recent_requests(s, two.group_id, limit=500)
            return {row.domain for row in rows}

    until(lambda: domains() >= {"default", "open"}, 30, "the traces")
    assert domains() == {"default", "open"}, "warm-ups are not there, nor no's"


def test_what_comes_by_another_door_is_served_counted_and_not_learnt_from(two: Running) -> None:
    assert "consent" not in (two.row().notices or {})
    done = subprocess.run(
        [sys.executable, "-c", PYTHON_ENGINE, str(two.process.pid)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for number in range(2):
        row = two.request(f"engine {number}", 60)
        assert (row.domain, row.may_train, row.traced) == ("default", False, False)
        assert row.status == "finished" and row.completion_tokens == 3
    until(lambda: "2 requests" in (two.row().notices or {}).get("consent", ""), 20, "the notice")
    log = two.process.log.read_text(errors="replace")
    assert log.count("because nobody could see the x-aurora headers") == 1
    consent = next(f for f in doctor.examine() if f.name == "consent")
    assert "gRPC" in consent.found


@pytest.mark.parametrize(
    ("path", "body", "wrong"),
    [
        ("/v1/completions", {"prompt": [999_999]}, 999_999),
        ("/v1/completions", {"prompt": [-1]}, -1),
        ("/v1/completions", {"prompt": [[1, 2], [3, VOCABULARY]]}, VOCABULARY),
        ("/v1/completions", {"prompt": [999_999], "stream": True}, 999_999),
        ("/v1/completions", {"prompt": [7, 999_999], "n": 2}, 999_999),
        ("/generate", {"input_ids": [999_999]}, 999_999),
        ("/generate", {"input_ids": [[1, 2], [3, -5]]}, -5),
    ],
    ids=str,
)
def test_a_token_that_the_model_does_not_know_gets_a_400(
    two: Running, path: str, body: dict[str, Any], wrong: int
) -> None:
    answer = httpx.post(f"{two.url}{path}", json={"model": "any", **body}, timeout=60)
    assert answer.status_code == 400
    assert REFUSED.format(wrong) in answer.text
    assert two.generate([VOCABULARY - 1, 0], max_new_tokens=2)["output_ids"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/generate", {"sampling_params": {"top_k": 1 << 40}}, "top_k must be at most"),
        (
            "/generate",
            {"sampling_params": {"min_new_tokens": 1, "stop_token_ids": [999_999]}},
            "stop_token_ids has the token id 999999",
        ),
        (
            "/v1/completions",
            {"min_tokens": 1, "stop_token_ids": [-1]},
            "stop_token_ids has the token id -1",
        ),
        (
            "/generate",
            {"return_logprob": True, "top_logprobs_num": 100_000},
            "top_logprobs_num must be from 0 to",
        ),
        ("/v1/completions", {"logprobs": 100_000}, "top_logprobs_num must be from 0 to"),
        # Of these SGLang's contract of 0.5.23 for this path speaks first.
        ("/generate", {"sampling_params": {"logit_bias": {"5": "abc"}}}, "invalid type"),
        ("/generate", {"sampling_params": {"logit_bias": {"5": None}}}, "invalid type"),
        ("/generate", {"sampling_params": {"max_new_tokens": 5.5}}, "invalid type"),
        ("/generate", {"sampling_params": {"json_schema": {"type": "object"}}}, "invalid type"),
        ("/generate", {"sampling_params": [{}]}, "sampling_params must be an object"),
        ("/generate", {"token_indices_to_pool": [9]}, "outside the prompt's 2 tokens"),
        ("/generate", {"return_logprob": True, "top_logprobs_num": [5, 5]}, "top_logprobs_num"),
        ("/generate", {"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
    ],
    ids=str,
)
def test_what_would_end_the_scheduler_gets_a_400(
    two: Running, path: str, body: dict[str, Any], said: str
) -> None:
    prompt = {"input_ids": [1, 2]} if path == "/generate" else {"prompt": [1, 2]}
    answer = httpx.post(f"{two.url}{path}", json={"model": "any", **prompt, **body}, timeout=60)
    assert answer.status_code == 400 and said in answer.text, answer.text
    assert two.generate([1, 2], max_new_tokens=2)["output_ids"]


def test_the_server_ends_when_its_scheduler_is_killed(two: Running) -> None:
    scheduler = next(p for p in two.process.family() if "scheduler" in " ".join(p.cmdline()))
    body = {"text": "Count.", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    with httpx.stream("POST", f"{two.url}/generate", json={**body, "stream": True}) as waiting:
        lines = waiting.iter_lines()
        assert next(lines)
        family = two.process.family()
        scheduler.kill()
        begun = time.monotonic()
        with pytest.raises(httpx.HTTPError):
            for _ in lines:
                pass
    assert time.monotonic() - begun < 20, "who waited was told"
    assert until(lambda: not two.process.running, 60, "the server's end")
    assert two.process._process is not None and two.process._process.returncode == 1
    assert "without which no request is answered" in two.process.log.read_text(errors="replace")
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
