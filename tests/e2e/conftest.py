"""One demo, one shared server, and the drafters that they need: real ones, whose proposals are
really accepted and really rejected.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.processes.server import ServerProcess, free_port
from aurora_sgl.store import queries
from aurora_sgl.store.models import StoreKey
from aurora_sgl.store.salt import HASHES
from tests.support import breaking
from tests.support.sidecar_engine import wait_until as until

ROOT = Path(__file__).parents[2]
PROMPTS = [
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a list.",
    "Name three rivers in Europe.",
    "What is the capital of Peru?",
    "Write a haiku about rain.",
    "List the steps to make tea.",
    "Why is the sky blue?",
    "Give me a JSON object with name and age.",
    "Translate 'good morning' into French.",
    "Tell a joke about a cat.",
    "What does HTTP stand for?",
    "Summarise the plot of Hamlet.",
    "Write a for loop in C.",
    "What is 12 times 7?",
    "Describe a sunset.",
    "How do plants make food?",
    "Define entropy.",
    "Write an email asking for a day off.",
    "What are prime numbers?",
    "Name a famous painter.",
]
TREE = (3, 4, 8)  # steps, top-k, nodes
DEMO_REQUESTS = 40  # one training run; keeps the suite short
DEMO_UPDATES = 60  # of that run: a third of what it makes otherwise
#: Key of the demo's store, which otherwise makes its own: by it 8 of the 40 are the gate's. By
#: chance they may be 3, of which no gate can tell that a version is better.
DEMO_KEY = hashlib.sha256(b"demo of the tests 18").hexdigest()
HELD_OUT = 8  # prompts that the demo measures, three times first and three times last


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(1500))


@dataclass
class Running:
    """A server, the store that it records into, and what tests ask of them."""

    process: ServerProcess
    home: Path
    engine: Engine
    group_id: int
    server_id: int

    @property
    def url(self) -> str:
        return self.process.url

    def generate(self, ids: list[int], headers: dict[str, str] | None = None, **sampling: Any):
        """One request to the native endpoint; returns SGLang's answer."""
        body = {"input_ids": ids, "sampling_params": {"temperature": 0, **sampling}}
        answer = httpx.post(f"{self.url}/generate", json=body, headers=headers, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def request(self, rid: str, seconds: float = 20.0) -> Any:
        """The store's row of a request, once it is finished."""

        def finished() -> Any:
            with store.session(self.engine, write=False) as s:
                rows = queries.requests.requests_by_rid(s, rid)
                return rows[0] if rows and rows[0].status != "running" else None

        return until(finished, seconds, f"request {rid} in the store")

    def events(self, request_id: int) -> list[dict[str, Any]]:
        """The decoded verify steps of a request, in order."""
        with store.session(self.engine, write=False) as s:
            return [dict(row) for row in queries.events.events(s, request_id)]

    def live_version(self) -> int | None:
        with store.session(self.engine, write=False) as s:
            return queries.servers.server(s, self.server_id).live_version_id

    def row(self) -> Any:
        with store.session(self.engine, write=False) as s:
            return queries.servers.server(s, self.server_id)


def start(
    home: Path,
    model: Path,
    drafter: Path | None,
    *,
    shape: tuple[int, int, int] = TREE,
    dtype: str = "float32",
    flags: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    port: int = 0,
    shared: dict[str, str] | None = None,
    ready_seconds: float = 480,
) -> Running:
    """A server as ``aurora-sgl serve`` starts it; ``shared``: settings of a store and an artifact
    root that others use too."""
    from aurora_sgl.config import Settings
    from aurora_sgl.serving import plan

    port = port or free_port()
    steps, topk, nodes = shape
    given = [
        *("--dtype", dtype, "--max-running-requests", "8"),
        *("--speculative-num-steps", str(steps), "--speculative-eagle-topk", str(topk)),
        *("--speculative-num-draft-tokens", str(nodes), *flags),
    ]
    if "--max-total-tokens" not in given:
        given += ["--max-total-tokens", "4096"]
    settings = Settings(home=home, **(shared or {}))
    made = plan(str(model), str(drafter) if drafter else None, given, settings)
    engine = store.connect(settings.store_url)
    with store.session(engine, write=False) as s:
        boots = {
            row.id
            for group in queries.groups.groups(s)
            for row in queries.servers.servers(s, group.id)
        }
    process = ServerProcess(
        made.flags,
        port=port,
        log=home / "logs" / "server.log",
        environment={
            **made.environment,
            "OMP_NUM_THREADS": "1",
            "AURORA_SPECULATION": "on",
            "AURORA_EXIT_WITH_PARENT": "1",
            **{f"AURORA_{name.upper()}": value for name, value in (shared or {}).items()},
            **(environment or {}),
        },
    )
    process.start()
    try:
        process.wait_ready(ready_seconds)
    except AuroraError:
        print(process.log_tail(200))
        raise

    def known() -> tuple[int, int] | None:
        with store.session(engine, write=False) as s:
            for group in queries.groups.groups(s):
                for row in queries.servers.servers(s, group.id):
                    mine = row.name.endswith(f":{port}") and row.id not in boots
                    if mine and row.live_version_id:
                        return group.id, row.id
        return None

    try:
        group_id, server_id = until(known, 180, "the server in the store")
    except BaseException:
        process.stop()
        raise
    return Running(process, home, engine, group_id, server_id)


@pytest.fixture(scope="session")
def base_home() -> Path:
    """Where the demo's model is kept between runs: converting it takes a while."""
    return Path(os.environ.get("AURORA_TEST_HOME", ROOT / "aurora-data")).resolve()


@pytest.fixture(scope="session")
def model(base_home: Path) -> Path:
    from aurora_sgl.demo.model import demo_model

    return demo_model(base_home, quiet=True)


@dataclass(frozen=True)
class DemoRun:
    """What ``aurora-sgl demo --exit --json`` left behind."""

    summary: dict[str, Any]
    home: Path
    errors: str
    seconds: float


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, model: Path, base_home: Path) -> DemoRun:
    kept = os.environ.get("AURORA_TEST_DEMO")  # of an earlier session, while working on one test
    if kept and (Path(kept) / "run.json").exists():
        found = json.loads((Path(kept) / "run.json").read_text())
        return DemoRun(found["summary"], Path(kept), found["errors"], found["seconds"])
    home = Path(kept) if kept else tmp_path_factory.mktemp("demo")
    home.mkdir(exist_ok=True)
    (home / "models").symlink_to(base_home / "models")
    _make_store(home)
    begun = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "aurora_sgl.cli",
            "demo",
            "--requests",
            str(DEMO_REQUESTS),
            "--held-out",
            str(HELD_OUT),
            "--set",
            f"young_updates={DEMO_UPDATES}",
            "--exit",
            "--json",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "AURORA_HOME": str(home)},
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    run = DemoRun(json.loads(done.stdout), home, done.stderr, time.monotonic() - begun)
    found = {"summary": run.summary, "errors": run.errors, "seconds": run.seconds}
    (home / "run.json").write_text(json.dumps(found))
    return run


def _make_store(home: Path) -> None:
    """With the key that sorts conversations into those that are learnt from and held-out ones."""
    engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
    store.upgrade(engine)
    with store.session(engine) as s:
        s.add(StoreKey(name=HASHES, value=DEMO_KEY))
    engine.dispose()


@pytest.fixture(scope="session")
def trained() -> Path:
    """A well-trained drafter of the demo's model. Not the demo's own: that one's file can run
    beside the files that need this one."""
    return ROOT / "benchmarks" / "static-drafter"


def chat_prompts(model: Path) -> list[list[int]]:
    """Token ids of twenty prompts, under the chat template where a model has one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    if tokenizer.chat_template is None:
        return [tokenizer(text)["input_ids"] for text in PROMPTS]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in PROMPTS
    ]


@pytest.fixture(scope="session")
def prompts(model: Path) -> list[list[int]]:
    return chat_prompts(model)


@pytest.fixture(scope="session")
def hugging_face(model: Path) -> Any:
    """The target in Hugging Face's own float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, model: Path, trained: Path
) -> Iterator[Running]:
    """The shared server: float32, trees, prompts in chunks of 64, a KV pool small enough to
    retract requests from when eight run at once: SGLang thinks that answers are short."""
    running = start(
        tmp_path_factory.mktemp("server"),
        model,
        trained,
        flags=(
            *("--chunked-prefill-size", "64", "--max-total-tokens", "768"),
            *("--schedule-conservativeness", "0.05"),
        ),
        environment={
            "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
            **breaking.installed(tmp_path_factory.mktemp("plugin")),
        },
    )
    yield running
    running.process.stop()
    running.engine.dispose()


@pytest.fixture(scope="session")
def eagle_drafter(
    tmp_path_factory: pytest.TempPathFactory,
    model: Path,
    server: Running,
    prompts: list[list[int]],
) -> Path:
    """An EAGLE drafter (embedding and head are the target's), trained on traces of the shared
    server."""
    import torch

    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.drafter import checkpoint, scratch
    from aurora_sgl.drafter.architectures.eagle import EAGLE
    from aurora_sgl.drafter.target import TargetHead
    from aurora_sgl.sequences import dataset
    from aurora_sgl.sequences.trace_cache import TraceFiles
    from aurora_sgl.training.settings import TrainSettings
    from aurora_sgl.training.trainer import train

    torch.set_num_threads(1)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda ids: server.generate(ids, max_new_tokens=48), prompts))
    finished = [server.request(answer["meta_info"]["id"], 60).id for answer in answers]

    def traced() -> bool:
        with store.session(server.engine, write=False) as s:
            return all(queries.traces.trace(s, one) is not None for one in finished)

    until(traced, 60, "the traces")
    with store.session(server.engine, write=False) as s:
        rows = queries.requests.recent_requests(s, server.group_id, limit=500)
    drafter = scratch.make(model, architecture=EAGLE)
    built = dataset.build(
        [row for row in rows if row.request_id in finished],
        TraceFiles(ArtifactRoot(str(server.home / "artifacts")), server.home / "cache"),
        drafter.config,
        dev_share=0.0,
        gate_share=0.0,
        donors=rows,
    )
    settings = TrainSettings(passes=1, max_seconds=40)
    result = train(drafter, built.train, TargetHead.load(model), settings)
    return checkpoint.save(result.drafter, tmp_path_factory.mktemp("eagle") / "drafter")
