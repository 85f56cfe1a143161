"""How many requests of a wide target do the trace files hold, for training and for the gate?

Random hidden states in bfloat16 go through the sidecar's writer and store until the budget is full
and a third as many again have come: rows full and compact, every prompt of its own, and chats that
share a system prompt. Prints bytes a token, what the writer takes in a second (one thread), and
which requests are left: all that can be used, and of them those on training's side and the gate's.

    python -m benchmarks.trace_room [--hidden 4096] [--tokens 1000] [--gib 2] [--json]
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.sequences.prefixes import Prefixes
from aurora_sgl.sequences.splits import GATE_SHARE, split_key, split_of
from aurora_sgl.sequences.trace_cache import TraceFiles
from aurora_sgl.sidecar.traces.assembler import AssembledTrace
from aurora_sgl.sidecar.traces.budget import TraceStore
from aurora_sgl.sidecar.traces.writer import TraceWriter
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.link import StoreLink
from aurora_sgl.trace_format import file_row_bytes
from benchmarks.servers import arguments, report
from tests.support.store_samples import BOOT, START_US, chain_step, finished, hello, started

GIB = 1 << 30
SYSTEM = 300  # tokens of a system prompt


def rows_of(hidden: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Random auxiliary and last hidden states as raw bfloat16, the first row a massive one."""
    random = np.random.default_rng(0)
    wide = random.standard_normal((tokens, 4 * hidden), np.float32)
    wide[0, ::500] *= 500
    raw = (wide.view(np.uint32) >> 16).astype(np.uint16)
    aux, last = (np.ascontiguousarray(part) for part in (raw[:, hidden:], raw[:, :hidden]))
    return aux.view(np.uint8), last.view(np.uint8)


class House:
    """One group with a budget, and the sidecar's end of its traces."""

    def __init__(self, folder: Path, form: str, budget: int) -> None:
        folder.mkdir()
        self.folder = folder
        url = f"sqlite:///{folder / 'aurora.db'}"
        self.engine = store.connect(url)
        store.upgrade(self.engine)
        with store.session(self.engine) as s:
            self.group_id = queries.groups.ensure_group(s, "default", "target", "", "eagle3").id
            server = queries.servers.register_server(s, self.group_id, hello(BOOT))
            self.server_id = server.id
            queries.limits.set_limits(s, self.group_id, {"trace_bytes": budget}, "benchmark")
        self.root = ArtifactRoot(str(folder / "artifacts"))
        self.writer = TraceWriter(self.root, folder / "tmp", form)
        self.store = TraceStore(StoreLink(url), self.root)

    def serve(self, number: int, trace: AssembledTrace) -> float:
        """The writer's seconds (of the processor)."""
        at_us = START_US + number * 1_000_000
        steps = [chain_step(number, 0, 1, at_us=at_us)]
        records = [started(number, at_us=at_us), *steps, finished(number, steps, at_us=at_us + 9)]
        ingest(self.engine, self.server_id, BOOT, [(number, records)])
        begun = time.process_time()
        row = self.writer.write(trace, None)
        took = time.process_time() - begun
        assert row is not None
        self.store.add([row])
        return took

    def left(self) -> dict[str, int]:
        """What is usable, counted as the scheduler and as a run do."""
        with store.session(self.engine, write=False) as s:
            counted = queries.requests.count_trainable(s, self.group_id)
            rows = queries.requests.recent_requests(s, self.group_id)
            held = queries.traces.trace_bytes_total(s, self.group_id)
            donors = queries.requests.donors(s, rows)
        prefixes = Prefixes([*rows, *donors], TraceFiles(self.root, self.folder / "cache"))
        usable = [row for row in rows if prefixes.pieces(row) is not None]
        sides = [split_of(split_key(r), dev_share=0, gate_share=GATE_SHARE) for r in usable]
        return {
            "MiB held": round(held / (1 << 20)),
            "counted": counted,
            "usable": len(usable),
            "for training": sides.count("train"),
            "for the gate": sides.count("gate"),
        }


def fill(folder: Path, form: str, hidden: int, tokens: int, budget: int, shared: bool) -> Any:
    aux, last = rows_of(hidden, tokens - 1)
    row_bytes = file_row_bytes(3 * hidden, hidden, 2, form)
    rows = tokens - 1 - (SYSTEM if shared else 0)
    house = House(folder, form, budget)
    seconds = written = 0.0
    requests = 4 * budget // (3 * row_bytes * rows)
    for number in range(1, requests + 1):
        start = SYSTEM if shared and number > 1 else 0
        own = np.random.default_rng(number).integers(0, 100_000, tokens)
        own[: SYSTEM if shared else 0] = 7
        header = wire.TraceHeader(
            BOOT, wire.request_id(BOOT, number), 0, [], "bfloat16", 3 * hidden, hidden, True,
            tokens // 2, True, [],
        )  # fmt: skip
        trace = AssembledTrace(header, own, start, aux[start:], last[start:], np.zeros(0, np.int64))
        seconds += house.serve(number, trace)
        written += trace.aux.nbytes + trace.last.nbytes
    return {
        "rows": form,
        "prompts": f"share {SYSTEM} tokens" if shared else "of their own",
        "bytes a token": row_bytes,
        "MB/s": round(written / seconds / 1e6) if seconds else 0,
        "served": requests,
        **house.left(),
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--cells", default="full,compact,shared")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="trace-room-"))
    table = []
    try:
        for cell in given.cells.split(","):
            form, shared = ("compact", True) if cell == "shared" else (cell, False)
            house = folder / cell
            budget = int(given.gib * GIB)
            table.append(fill(house, form, given.hidden, given.tokens, budget, shared))
            shutil.rmtree(house)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    title = f"{given.gib:g} GiB of traces, {given.tokens:,} tokens a request, hidden {given.hidden}"
    report(title, table, as_json=given.json, keep="trace room")


if __name__ == "__main__":
    main()
