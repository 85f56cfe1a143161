"""What does capture cost the scheduler's thread, and how much of what is traced is kept whole?

Three tables, of the engine's capture alone and without a model: the time that the scheduler's
thread spends on a prefill chunk and on a decode step (aims: at most 3 ms and 0.3 ms); the memory of
all processes while the sidecar stands still and prompts of 128,000 tokens come; and how many of the
requests of some streams are traced, and are whole in the store (aim: 90% of those that are traced).

    python -m benchmarks.capture [--parts cost,memory,streams] [--requests 96] [--json]
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from array import array
from contextlib import closing
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from aurora_sgl import wire
from aurora_sgl.config import Settings
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.engine.capture import Capture
from aurora_sgl.engine.channel import Channel
from aurora_sgl.engine.draft_tree import StepRows, VerifyObservation
from aurora_sgl.engine.request_state import RequestState
from aurora_sgl.trace_ring import RingReader
from benchmarks.servers import arguments, report
from tests.support.sidecar_engine import Sidecar, wait_until
from tests.support.store_samples import started

BOOT = 77
SHAPE = DraftShape(3, 4, 16)
ACCEPTED = 3
GIB = 1 << 30
MIB = 1 << 20
SERVER = {
    "name": "capture:1", "target_model": "target", "target_revision": "", "dtype": "bfloat16",
    "draft_architecture": "LlamaForCausalLMEagle3", "sglang_version": "0.5.21",
    "aux_layers": [1, 2, 3],
}  # fmt: skip


class Taken:
    """What the scheduler's thread spends from here to ``end``."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()
        self.processor = time.thread_time()
        self.interrupted = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw

    def end(self) -> None:
        self.seconds = time.perf_counter() - self.seconds
        self.processor = time.thread_time() - self.processor
        now = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
        self.interrupted = now - self.interrupted

    def __add__(self, other: Taken) -> Taken:
        both = Taken()
        both.seconds = self.seconds + other.seconds
        both.processor = self.processor + other.processor
        both.interrupted = self.interrupted + other.interrupted
        return both


class Engine:
    """The scheduler's thread: forwards of a target of this width, and our capture beside them."""

    def __init__(self, endpoint: Path, hidden: int, **settings: int) -> None:
        endpoint.mkdir(parents=True, exist_ok=True)
        self.hidden = hidden
        self.channel = Channel(endpoint, BOOT, 20_000)
        self.capture = Capture.of(Settings(**settings), self.channel.send_traces, BOOT, 8 * hidden)
        self.capture.learn_layout(*self.forward(1))
        self.requests = 0
        self.began = Taken()  # the latest request

    def forward(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a forward leaves: memory of its own, written once."""
        aux = torch.empty(rows, 3 * self.hidden, dtype=torch.bfloat16).fill_(1)
        return aux, torch.empty(rows, self.hidden, dtype=torch.bfloat16).fill_(1)

    def begin(self, prompt: int, answer: int) -> tuple[Any, RequestState]:
        self.requests += 1
        state = RequestState(wire.request_id(BOOT, self.requests), True, True, True, 0)
        tokens = array("q", range(prompt))
        req = SimpleNamespace(origin_input_ids=tokens, output_ids=array("q"), finished_len=None)
        self.began = Taken()
        if ticket := self.capture.choose(prompt, answer):
            self.capture.begin(req, state, ticket)
        self.began.end()
        return req, state

    def prefill(self, req: Any, state: RequestState, start: int, rows: int) -> Taken:
        """One chunk."""
        aux, last = self.forward(rows)
        taken = Taken()
        gathered = self.capture.gather(aux, last)
        self.capture.prompt_rows(gathered, req, state, start, 0, rows)
        self.capture.hand_over(gathered)
        taken.end()
        if start + rows == len(req.origin_input_ids):
            req.output_ids.append(1)
        return taken

    def step(self, some: list[tuple[Any, RequestState]], *, length: int = 1 << 30) -> Taken:
        """One decode step; requests with answers of ``length`` tokens end."""
        size, nodes = len(some), SHAPE.nodes
        aux, last = self.forward(size * nodes)
        paths = torch.arange(size)[:, None] * nodes + torch.arange(SHAPE.depth + 1)[None]
        zeros = torch.zeros(size, nodes, dtype=torch.int64)
        observation = VerifyObservation(
            zeros, zeros, zeros, paths, None, SHAPE, 0, 0, 0, False, aux, last
        )
        step = StepRows(observation, [ACCEPTED] * size, size)
        tracked = [(row, *one, len(one[0].output_ids)) for row, one in enumerate(some)]
        for req, _ in some:
            req.output_ids.extend([1] * min(ACCEPTED, length - len(req.output_ids)))
        taken = Taken()
        gathered = self.capture.gather(aux, last)
        self.capture.step_rows(gathered, tracked, step)
        for req, state in some:
            if len(req.output_ids) >= length:
                self.capture.end(gathered, req, state)
        self.capture.hand_over(gathered)
        taken.end()
        return taken

    def close(self) -> None:
        self.capture.copier.close()


def read_and_free(endpoint: str, ready: Any) -> None:
    """A sidecar that frees what it is told of and looks at nothing."""
    import zmq

    os.nice(10)
    socket = zmq.Context().socket(zmq.PULL)
    socket.bind(f"ipc://{endpoint}/traces")
    ready.set()
    ring: RingReader | None = None
    while True:
        batch = wire.decode_trace_batch(socket.recv())
        if ring is None or ring.path != batch.ring:
            ring = RingReader(batch.ring)
        ring.free(batch.end)


def cost(folder: Path) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    rows = []
    for hidden in (576, 4096, 8192):
        endpoint = folder / f"cost-{hidden}"
        endpoint.mkdir()
        ready = context.Event()
        reader = context.Process(target=read_and_free, args=(str(endpoint), ready), daemon=True)
        reader.start()
        assert ready.wait(60)
        big = 64 * GIB
        engine = Engine(
            endpoint, hidden, capture_request_bytes=big, trace_memory_bytes=big,
            capture_bytes_per_second=big, capture_backlog_bytes=4 * GIB,
        )  # fmt: skip
        for chunk in (2048, 8192):
            took = [_one_prefill(engine, chunk) for _ in range(12)]
            rows.append(_cost_row(hidden, f"prefill of {chunk:,}", took, 3.0))
        for size in (16, 64):
            some = [engine.begin(8, 10_000) for _ in range(size)]
            for req, state in some:
                engine.prefill(req, state, 0, 8)
            took = [engine.step(some) for _ in range(60) if time.sleep(0.03) is None]
            rows.append(_cost_row(hidden, f"step of {size}", took, 0.3))
        assert not engine.capture.dropped + engine.capture.copier.dropped
        engine.close()
        reader.terminate()
    return rows


def _one_prefill(engine: Engine, chunk: int) -> Taken:
    req, state = engine.begin(chunk, 16)
    took = engine.began + engine.prefill(req, state, 0, chunk)
    wait_until(lambda: engine.capture.copier.held == 0, 60)
    return took


def _cost_row(hidden: int, what: str, took: list[Taken], aim: float) -> dict[str, Any]:
    """The longest also of those calls in which the machine gave the processor to nobody else: what
    is left is our own work and waiting for the copier's thread."""
    ours = [one.seconds for one in took if not one.interrupted]
    return {
        "hidden": hidden,
        "what": what,
        "median ms": round(1000 * median(one.seconds for one in took), 3),
        "longest ms": round(1000 * max(one.seconds for one in took), 3),
        "longest undisturbed": round(1000 * max(ours), 3) if ours else None,
        "processor ms": round(1000 * median(one.processor for one in took), 3),
        "aim ms": aim,
    }


def _memory_of(process: psutil.Process) -> float:
    """MiB that are its own; the ring's pages count where they were written."""
    full = process.memory_full_info()
    return float(full.pss if hasattr(full, "pss") else full.rss) / MIB


def memory(folder: Path) -> list[dict[str, Any]]:
    """Prompts of 128,000 tokens, and of 3,000, before a sidecar that stands still."""
    rows = []
    for name, request_bytes, backlog in (
        ("as set by default", 128 * MIB, GIB),
        ("prompts of any length traced", 64 * GIB, GIB),
    ):
        home = folder / f"memory-{request_bytes}"
        endpoint = home / "e"
        endpoint.mkdir(parents=True)
        sidecar = Sidecar(home / "home", endpoint)
        sidecar.wait_ready()
        total = max(512 * MIB, request_bytes)
        engine = Engine(
            endpoint, 4096, capture_request_bytes=request_bytes, trace_memory_bytes=total,
            capture_bytes_per_second=64 * GIB, capture_backlog_bytes=backlog,
        )  # fmt: skip
        other = psutil.Process(sidecar.process.pid)
        other.send_signal(signal.SIGSTOP)
        before = _memory_of(psutil.Process()), _memory_of(other)
        most = [0.0, 0.0]
        begun = time.monotonic()
        while time.monotonic() - begun < 25:
            for prompt in (128_000, 3_000, 3_000):
                _prefill_all(engine, prompt, 2048)
                now = _memory_of(psutil.Process()), _memory_of(other)
                most = [max(m, n - b) for m, n, b in zip(most, now, before, strict=True)]
        counters = engine.capture.counters()
        rows.append(
            {
                "budgets": name,
                "requests": engine.requests,
                "traced": int(counters["traces_admitted"]),
                "engine MiB more": round(most[0]),
                "its bound": round((64 * MIB + backlog) / MIB),
                "sidecar MiB more": round(most[1]),
            }
        )
        other.send_signal(signal.SIGCONT)
        engine.close()
        sidecar.kill()
    return rows


def _prefill_all(engine: Engine, prompt: int, chunk: int) -> None:
    req, state = engine.begin(prompt, 64)
    for start in range(0, prompt if state.trace is not None else 0, chunk):
        engine.prefill(req, state, start, min(chunk, prompt - start))
        time.sleep(0.01)
    if state.trace is not None:
        gathered = engine.capture.gather(None, None)
        engine.capture.end(gathered, req, state)
        engine.capture.hand_over(gathered)


def streams(
    folder: Path, requests: int, step_ms: float, count: int, hidden: int
) -> list[dict[str, Any]]:
    """So many streams of 500 + 500 tokens of a target so wide."""
    home, endpoint = folder / "home", folder / "e"
    sidecar = Sidecar(home, endpoint, capture_bytes=32 * GIB)
    engine = Engine(endpoint, hidden)
    sidecar.wait_ready()
    running: list[tuple[Any, RequestState]] = []
    begun, hello, late = time.monotonic(), 0.0, 0
    while engine.requests < requests or running:
        now = time.monotonic()
        if now - hello > 1.0:
            hello = now
            _hello(engine)
        if len(running) < count and engine.requests < requests:
            req, state = engine.begin(500, 500)
            number = engine.requests
            engine.channel.put([started(number, boot_id=BOOT)])
            engine.prefill(req, state, 0, 500)
            running.append((req, state))
        engine.step(running, length=500)
        running = [one for one in running if len(one[0].output_ids) < 500]
        rest = now + step_ms / 1000 - time.monotonic()
        late += rest < 0
        time.sleep(max(0.0, rest))
    seconds = time.monotonic() - begun
    counters = engine.capture.counters()
    admitted = int(counters["traces_admitted"])
    whole = _whole(engine, home / "aurora.db", admitted)
    engine.close()
    sidecar.stop()
    if whole < admitted:
        print(sidecar.text()[-3000:], counters, file=sys.stderr)
    refused = {name[15:]: int(count) for name, count in counters.items() if "refused_" in name}
    return [
        {
            "streams": count,
            "KiB a row": hidden * 8 // 1024,
            "requests": requests,
            "seconds": round(seconds),
            "traced": admitted,
            "share": round(admitted / requests, 2),
            "whole": whole,
            "of traced": round(whole / max(1, admitted), 3),
            "refused": ", ".join(f"{count} {name}" for name, count in refused.items()),
            "MiB/s": round(whole * 999 * hidden * 8 / MIB / seconds, 1),
        }
    ]


def _hello(engine: Engine) -> None:
    counters = engine.capture.counters()
    engine.channel.put([wire.Hello(BOOT, os.getpid(), SERVER, 0, 0, 0, counters)])


def _whole(engine: Engine, database: Path, admitted: int) -> int:
    """Traces in the store that have every row; waits for what is still on its way."""
    count, deadline = 0, time.monotonic() + 60
    while count < admitted and time.monotonic() < deadline:
        _hello(engine)
        with closing(sqlite3.connect(database)) as connection:
            query = 'SELECT count(*) FROM trace WHERE start = 0 AND "end" >= 999'
            count = int(connection.execute(query).fetchone()[0])
        time.sleep(1)
    return count


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--parts", default="cost,memory,streams")
    parser.add_argument("--requests", type=int, default=96, help="of the streams")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=8192, help="width of their target")
    parser.add_argument("--step-ms", type=float, default=25.0, help="time of a step there")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="capture-"))
    try:
        for part in given.parts.split(","):
            (folder / part).mkdir()
            title, rows = _part(part, folder / part, given)
            report(title, rows, as_json=given.json, keep=f"capture {part}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _part(name: str, folder: Path, given: Any) -> tuple[str, list[dict[str, Any]]]:
    if name == "cost":
        return "scheduler's thread", cost(folder)
    if name == "memory":
        return "memory beside a sidecar that stands still", memory(folder)
    return "streams of 500 + 500 tokens", streams(
        folder, given.requests, given.step_ms, given.streams, given.hidden
    )


if __name__ == "__main__":
    main()
