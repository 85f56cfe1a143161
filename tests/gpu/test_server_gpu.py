"""SGLang with the plugin on a GPU: overlap scheduling and CUDA graphs, as users run it.

Servers start beside each other, as ``aurora-sgl serve`` starts them: float32 on Triton's attention,
where greedy answers can be compared token by token, with trees and with chains; and bfloat16 on
FlashInfer's with trees.

``AURORA_TEST_TARGET`` and ``AURORA_TEST_DRAFTER`` name other folders than the demo's model and an
untrained drafter; ``AURORA_TEST_LOGS`` is where the servers' logs are kept when a test fails;
``AURORA_TEST_SERVERS`` names some of the servers; ``AURORA_TEST_FLAGS`` are more flags of SGLang.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

pytest.importorskip("sqlalchemy")
pytest.importorskip("msgspec")
pytest.importorskip("zmq")

import httpx

from aurora_sgl.drafter import checkpoint
from aurora_sgl.rollout.promote import rollback
from aurora_sgl.store import queries, session
from tests.e2e.conftest import PROMPTS, Running, chat_prompts, start, until
from tests.e2e.test_identity import assert_greedy
from tests.e2e.test_records import accepted_path, assert_identities, read, serve
from tests.e2e.test_swap import a_relative, go_live, server_group

#: For working on these tests where there is no GPU, with one server.
ON_CPU = os.environ.get("AURORA_TEST_SERVERS_ON_CPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not ON_CPU, reason="needs a CUDA GPU"),
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang"),
    pytest.mark.timeout(600),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TREE, CHAIN = (3, 4, 8), (3, 1, 4)
#: name -> (steps, top-k and nodes; dtype; attention)
SERVERS = {
    "trees in float32": (TREE, "float32", "triton"),
    "chains in float32": (CHAIN, "float32", "triton"),
    "trees in bfloat16": (TREE, "bfloat16", "flashinfer"),
}
CHOSEN = [
    name
    for name in SERVERS
    if name in os.environ.get("AURORA_TEST_SERVERS", ",".join(SERVERS)).split(",")
]
EXACT = [name for name in CHOSEN if SERVERS[name][1] == "float32"]
TOKENS = 48
_READY_SECONDS = 400.0  # FlashInfer and SGLang compile kernels when they are first used


def _flags(dtype: str, attention: str) -> tuple[str, ...]:
    more = shlex.split(os.environ.get("AURORA_TEST_FLAGS", ""))
    if DEVICE == "cpu":
        return tuple(more)
    flags = ["--attention-backend", attention, "--mem-fraction-static", "0.25"]
    flags += ["--cuda-graph-max-bs-decode", "8", "--cuda-graph-max-bs-prefill", "256"]
    flags += ["--max-total-tokens", "16384"]
    if dtype == "float32":
        flags += ["--sampling-backend", "pytorch"]
    return (*flags, *more)


#: SGLang's CUDA kernels of these take half precision only; the float32 servers use its PyTorch.
NATIVE = (
    "sglang.srt.layers.layernorm.RMSNorm",
    "sglang.srt.layers.activation.SiluAndMul",
    "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding",
)
FLOAT32_PLUGIN = f"""
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register():
    for name in {NATIVE}:
        HookRegistry.register(f"{{name}}.forward_cuda", native, HookType.AROUND)


def native(original, layer, *args, **kw):
    return layer.forward_native(*args, **kw)
"""


def float32_environment(folder: Path) -> dict[str, str]:
    """Exact float32, and a plugin of SGLang in ``folder`` beside our own."""
    metadata = folder / "float32_layers-0.0.1.dist-info"
    metadata.mkdir()
    (folder / "float32_layers.py").write_text(FLOAT32_PLUGIN)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: float32-layers\nVersion: 0.0.1\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nfloat32 = float32_layers:register\n"
    )
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("AURORA_TEST_TARGET"):
        return Path(given)
    from aurora_sgl.demo.model import demo_model

    return demo_model(Path(os.environ.get("AURORA_HOME", "aurora-data")).resolve(), quiet=True)


@pytest.fixture(scope="module")
def drafter(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("AURORA_TEST_DRAFTER"):
        return Path(given)
    from aurora_sgl.drafter import scratch

    made = scratch.make(target, texts=PROMPTS)
    return checkpoint.save(made, tmp_path_factory.mktemp("drafter") / "scratch")


@pytest.fixture(scope="module")
def servers(
    target: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Running]]]:
    """All that were chosen, started at once; one that failed raises when it is asked for."""
    homes = {name: tmp_path_factory.mktemp("server") for name in CHOSEN}

    def begin(name: str) -> Running:
        shape, dtype, attention = SERVERS[name]
        exact = dtype == "float32" and DEVICE == "cuda"
        environment = float32_environment(homes[name]) if exact else {}
        return start(
            homes[name],
            target,
            drafter,
            shape=shape,
            dtype=dtype,
            flags=_flags(dtype, attention),
            environment=environment,
            ready_seconds=_READY_SECONDS,
        )

    with ThreadPoolExecutor(len(CHOSEN)) as pool:
        started = {}
        for name in CHOSEN:
            started[name] = pool.submit(begin, name)
            time.sleep(1.0)  # two must not choose the same free port
        try:
            yield started
        finally:
            for name, one in started.items():
                if one.exception() is None:
                    one.result().process.stop()
                    one.result().engine.dispose()
                if logs := os.environ.get("AURORA_TEST_LOGS"):
                    log = homes[name] / "logs" / "server.log"
                    if log.exists():
                        Path(logs).mkdir(parents=True, exist_ok=True)
                        shutil.copy(log, Path(logs) / f"{name.replace(' ', '-')}.log")


def is_exact(server: Running) -> bool:
    """Whether it computes in float32."""
    return "float32" in server.process._flags


@pytest.fixture(params=CHOSEN)
def server(servers: dict[str, Future[Running]], request: pytest.FixtureRequest) -> Running:
    return servers[request.param].result()


@pytest.fixture(params=EXACT)
def exact(servers: dict[str, Future[Running]], request: pytest.FixtureRequest) -> Running:
    return servers[request.param].result()


@pytest.fixture(scope="module")
def prompts(target: Path) -> list[list[int]]:
    return chat_prompts(target)


class OnDevice:
    """The target in Hugging Face's own float32, asked and answering with tensors on the CPU."""

    def __init__(self, target: Path) -> None:
        from transformers import AutoModelForCausalLM

        torch.backends.cuda.matmul.allow_tf32 = False
        model = AutoModelForCausalLM.from_pretrained(str(target), dtype=torch.float32)
        self.model: Any = model.eval().to(DEVICE)
        self.head = self.model.lm_head.weight.detach().cpu()
        self.layers = int(self.model.config.num_hidden_layers)

    def __call__(self, ids: torch.Tensor, **more: Any) -> Any:
        with torch.inference_mode():
            found = self.model(ids.to(DEVICE), **more)
        found.logits = found.logits.cpu()
        return found


@pytest.fixture(scope="module")
def hugging_face(target: Path) -> OnDevice:
    return OnDevice(target)


def test_servers_run_with_overlap_scheduling_and_cuda_graphs(server: Running) -> None:
    info = httpx.get(f"{server.url}/get_server_info", timeout=30).json()
    if DEVICE == "cuda":
        assert not info.get("disable_overlap_schedule") and not info.get("disable_cuda_graph")
        assert "is switched off" not in server.process.log.read_text(errors="replace")
    with session(server.engine, write=False) as s:
        row = queries.servers.server(s, server.server_id)
        version = queries.versions.version(s, row.live_version_id)
    assert row.live_sha256 == version.weights_sha256


def test_greedy_answers_are_the_targets_own(
    exact: Running, prompts: list[list[int]], hugging_face: OnDevice
) -> None:
    def one(prompt: list[int]) -> dict[str, Any]:
        return dict(exact.generate(prompt, max_new_tokens=TOKENS))

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(one, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_greedy(hugging_face, prompt, answer["output_ids"])
    infos = [answer["meta_info"] for answer in answers]
    steps = sum(info["spec_verify_ct"] for info in infos)
    accepted = sum(info["spec_num_correct_drafts"] for info in infos)
    print(f"accept length {1 + accepted / steps:.3f}")
    assert steps > 0
    if os.environ.get("AURORA_TEST_DRAFTER"):
        assert accepted / steps > 0.02


def test_records_agree_with_sglangs_own_counters(
    server: Running, prompts: list[list[int]], record_property: Any
) -> None:
    def one(prompt: list[int]) -> Any:
        return serve(server, prompt, max_new_tokens=TOKENS)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, prompts[:12]))
    for answer, row, steps in found:
        assert_identities(answer, row, steps)
        written = answer["output_ids"][:1]
        for step in steps:
            written += accepted_path(step)[1][: step["kept"]]
        assert written == answer["output_ids"]
    rows = [row for _, row, _ in found]
    length = 1 + sum(row.accepted for row in rows) / sum(row.verify_steps for row in rows)
    record_property("accept_length", length)


def test_sampled_answers_are_recorded_too(server: Running, prompts: list[list[int]]) -> None:
    for sampling in ({"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}):
        answer, row, steps = serve(server, prompts[6], max_new_tokens=TOKENS, **sampling)
        assert {step["accept_rule"] for step in steps} <= {"target_sampling"}
        assert_identities(answer, row, steps)
        written = answer["output_ids"][:1]
        for step in steps:
            written += step["target_tokens"][: step["kept"]]
        assert written == answer["output_ids"]


def test_traces_hold_what_hugging_face_computes(
    server: Running, prompts: list[list[int]], hugging_face: OnDevice
) -> None:
    """The prompt's rows come out of an eager forward or a prefill graph, the answer's out of the
    verify graph; four requests at once, so that rows lie at places of a batch."""
    httpx.post(f"{server.url}/flush_cache", timeout=30)

    def one(prompt: list[int]) -> Any:
        return serve(server, prompt, max_new_tokens=40, ignore_eos=True)

    long = [[token for some in prompts[at : at + 3] for token in some] for at in range(8, 16, 2)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, long))
    exactly = is_exact(server)
    layers = [2, hugging_face.layers // 2, hugging_face.layers - 3]  # as SGLang chooses
    compared = 0
    for prompt, (answer, row, _) in zip(long, found, strict=True):
        trace = read(server, row.id)
        tokens = prompt + answer["output_ids"]
        assert trace.tokens.tolist() == tokens
        assert trace.end >= len(tokens) - 1, "positions of the answer are missing"
        assert trace.start <= row.cached_tokens
        rows = len(tokens) - 1
        wanted = hugging_face(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        aux = torch.cat([wanted[layer][0, trace.start : rows] for layer in layers], -1).cpu()
        ours = trace.aux[: rows - trace.start].float()
        error = float((ours - aux).norm() / aux.norm())
        assert error < (1e-3 if exactly else 3e-2), error
        # Row by row, so that a few rows of another place can't hide.
        worst = float(((ours - aux).norm(dim=-1) / aux.norm(dim=-1)).max())
        assert worst < (2e-2 if exactly else 0.2), worst
        last = wanted[-1][0, trace.start : rows].cpu()
        mine = trace.last[: rows - trace.start].float()
        worst = float(((mine - last).norm(dim=-1) / last.norm(dim=-1)).max())
        assert worst < (2e-2 if exactly else 0.3), worst
        if exactly:
            logits = mine[len(prompt) - 1 - trace.start :] @ hugging_face.head.T
            picked = logits.gather(-1, torch.tensor(answer["output_ids"])[:, None])[:, 0]
            assert float((logits.max(-1).values - picked).max()) < 1e-2
        compared += rows - trace.start
    assert compared > 100


class Stream(threading.Thread):
    """One long greedy answer, and when its pieces arrived."""

    def __init__(self, server: Running, prompt: list[int], tokens: int) -> None:
        super().__init__(daemon=True)
        self.server, self.prompt, self.tokens = server, prompt, tokens
        self.rid = uuid.uuid4().hex
        self.arrivals: list[float] = []
        self.output: list[int] = []

    def run(self) -> None:
        body = {
            "input_ids": self.prompt,
            "rid": self.rid,
            "stream": True,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": self.tokens,
                "ignore_eos": True,
            },
        }
        url = f"{self.server.url}/generate"
        with httpx.stream("POST", url, json=body, timeout=200) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.arrivals.append(time.perf_counter())
                    self.output = json.loads(line[6:])["output_ids"]


def test_a_swap_in_mid_request_is_seen_by_the_graphs_and_changes_no_token(
    server: Running,
    drafter: Path,
    prompts: list[list[int]],
    hugging_face: OnDevice,
    tmp_path: Path,
    record_property: Any,
) -> None:
    before = server.live_version()
    assert before is not None
    near = a_relative(server, drafter, tmp_path / "near", 0.97)
    # In float32 Triton's attention over drafts takes 0.1 s a step at a few hundred tokens (H200).
    quick = DEVICE == "cuda" and not is_exact(server)
    stream = Stream(server, prompts[0], 1500 if quick else 200)
    stream.start()
    until(lambda: len(stream.arrivals) > 20, 60, "the answer")
    begun = time.perf_counter()
    go_live(server, near)
    ended = time.perf_counter()
    assert stream.is_alive(), "the answer ended before the swap: ask for more tokens"
    stream.join()
    gaps = [(b, b - a) for a, b in pairwise(stream.arrivals)]
    step = median(length for _, length in gaps)
    worst = max(length for end, length in gaps if begun <= end <= ended + 0.3)
    other = max((n for end, n in gaps if not begun <= end <= ended + 0.3), default=0.0)
    print(f"step {1e3 * step:.2f} ms, worst at the swap {1e3 * worst:.2f}, else {1e3 * other:.2f}")
    record_property("gap_at_swap_ms", 1e3 * worst)
    if is_exact(server):
        assert_greedy(hugging_face, prompts[0], stream.output)
    row = server.request(stream.rid)
    steps = server.events(row.id)
    versions = [one["drafter_version_id"] for one in steps]
    assert versions == sorted(versions, key=[before, near].index)
    assert set(versions) == {before, near}
    first = versions.index(near)
    assert not any(one["mixed"] for one in steps[:first])
    assert all(one["mixed"] for one in steps[first:])
    with session(server.engine, write=False) as s:
        live = queries.servers.server(s, server.server_id).live_sha256
        assert live == queries.versions.version(s, near).weights_sha256
    rollback(server.engine, server_group(server), actor="test", reason="back to where it was")
    until(lambda: server.live_version() == before, 30, "the rollback")


def test_a_very_different_drafter_drafts_differently_and_a_rollback_brings_the_old_one_back(
    server: Running, drafter: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    before = server.live_version()

    def proposals() -> list[list[int]]:
        """All draft tokens of four answers, prefilled with what is live."""
        found = [serve(server, prompt, max_new_tokens=24)[2] for prompt in prompts[:4]]
        assert not any(step["mixed"] for steps in found for step in steps)
        return [step["draft_tokens"] for steps in found for step in steps]

    old = proposals()
    upside_down = a_relative(server, drafter, tmp_path / "other", -1.0, "lm_head")
    go_live(server, upside_down)
    new = proposals()
    same = sum(a == b for a, b in zip(old, new, strict=False))
    assert same < 0.1 * len(old)
    rollback(server.engine, server_group(server), actor="test", reason="undo")
    until(lambda: server.live_version() == before, 30, "the rollback")
    again = proposals()
    if is_exact(server):
        assert again == old
