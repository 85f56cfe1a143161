"""The engine's capture and the sidecar's intake in one process, without a socket between them."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from aurora_sgl import wire
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.engine.capture import Capture
from aurora_sgl.engine.copier import Copier
from aurora_sgl.engine.draft_tree import StepRows, VerifyObservation
from aurora_sgl.engine.request_state import RequestState
from aurora_sgl.engine.trace_budget import TraceBudget
from aurora_sgl.sidecar.traces.assembler import AssembledTrace, TraceAssembler
from aurora_sgl.sidecar.traces.intake import TraceIntake

SHAPE = DraftShape(3, 1, 4)
MIB = 1 << 20


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return value


class House:
    """``reads``: whether the sidecar takes anything."""

    def __init__(
        self,
        *,
        hidden: int = 8,
        ring_bytes: int = MIB,
        request_bytes: int = 64 * MIB,
        total_bytes: int = 64 * MIB,
        bytes_per_second: int = 1 << 40,
        most_held: int = 1 << 40,
        dtype: torch.dtype = torch.float32,
        send: Callable[[wire.TraceBatch], bool] | None = None,
    ) -> None:
        """``send``: to another process; then there is no sidecar in this one."""
        self.hidden, self.dtype = hidden, dtype
        self.budget = TraceBudget(
            4 * hidden * dtype.itemsize,
            request_bytes=request_bytes,
            total_bytes=total_bytes,
            bytes_per_second=bytes_per_second,
        )
        self.assembler = TraceAssembler(total_bytes)
        self.intake = TraceIntake(self.assembler)
        self.is_there, self.reads = True, True
        self.unread: list[bytes] = []
        self.batches: list[wire.TraceBatch] = []
        self._lock = threading.Lock()
        self.copier = Copier(send or self._send, 7, ring_bytes)
        self.capture = Capture(self.budget, self.copier, most_held=most_held)
        aux, last = self.forward(1)
        self.capture.learn_layout(aux, last)
        self.requests = 0
        self.started: Callable[[int], Any] = self._started

    def _send(self, batch: wire.TraceBatch) -> bool:
        if not self.is_there:
            return False
        with self._lock:
            self.batches.append(batch)
            self.unread.append(wire.encode(batch))
        self.read()
        return True

    def read(self) -> None:
        with self._lock:
            while self.reads and self.unread:
                self.intake.take([self.unread.pop(0)])

    def start_sidecar_anew(self) -> None:
        with self._lock:
            self.intake.close()
            self.unread.clear()
            self.assembler = TraceAssembler(self.assembler.limit_bytes)
            self.intake = TraceIntake(self.assembler)
            self.is_there = self.reads = True

    def forward(self, rows: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Row n holds n + first, its last state minus that."""
        numbers = torch.arange(first, first + rows, dtype=torch.float32)[:, None]
        aux = numbers.repeat(1, 3 * self.hidden).to(self.dtype)
        return aux, -numbers.repeat(1, self.hidden).to(self.dtype)

    def begin(self, prompt: int, max_new: int = 64) -> tuple[Any, RequestState]:
        ticket = self.capture.choose(prompt, max_new)
        self.requests += 1
        state = RequestState(wire.request_id(7, self.requests), ticket > 0, True, True, 0)
        req = SimpleNamespace(
            origin_input_ids=array("q", range(100, 100 + prompt)),
            output_ids=array("q"),
            finished_len=None,
        )
        if ticket:
            self.capture.begin(req, state, ticket)
            self.started(self.requests)
        return req, state

    def _started(self, number: int) -> None:
        request_id = wire.request_id(7, number)
        self.assembler.heard(
            wire.RequestStarted(request_id, 0, "r", 0, "", "", 0, 0, {}, True, True, True)
        )

    def prefill(self, req: Any, state: RequestState, start: int, count: int) -> None:
        """Row of position p holds p."""
        aux, last = self.forward(count, start)
        gathered = self.capture.gather(aux, last)
        self.capture.prompt_rows(gathered, req, state, start, 0, count)
        self.capture.hand_over(gathered)
        if start + count == len(req.origin_input_ids):
            req.output_ids.append(500)

    def step(
        self, some: list[tuple[Any, RequestState]], accept: list[int], *, ends: tuple[int, ...] = ()
    ) -> None:
        """One verify step over nodes 0..3 of each, of which a path of ``accept`` nodes is kept."""
        nodes, size = SHAPE.nodes, len(some)
        aux, last = self.forward(size * nodes)
        paths = torch.full((size, SHAPE.depth + 1), -1)
        befores = []
        for row, ((req, _), count) in enumerate(zip(some, accept, strict=True)):
            before = len(req.output_ids)
            befores.append(before)
            position = len(req.origin_input_ids) + before - 1
            # In front: the path's auxiliary rows; the last states lie where the nodes are.
            path = [row * nodes + node for node in (0, 3, 2, 1)[:count]]
            paths[row, :count] = torch.tensor(path)
            for n, node in enumerate(path):
                aux[row * nodes + n] = position + n
                last[node] = -(position + n)
            req.output_ids.extend(range(500 + before, 500 + before + count))
        observation = VerifyObservation(
            draft_token=torch.zeros(size, nodes, dtype=torch.int64),
            first_child=torch.full((size, nodes), -1),
            next_sibling=torch.full((size, nodes), -1),
            accept_index=paths,
            target_predict=None,
            shape=SHAPE,
            version_id=0,
            swap_count=0,
            swap_age=0,
            rule="target_sampling",
            aux=aux,
            last=last,
        )
        rows = StepRows(observation, accept, size)
        gathered = self.capture.gather(aux, last)
        tracked = [(row, *one, befores[row]) for row, one in enumerate(some)]
        self.capture.step_rows(gathered, tracked, rows)
        for row, (req, state) in enumerate(some):
            if row in ends:
                self.capture.end(gathered, req, state)
        self.capture.hand_over(gathered)

    def finish(self, req: Any, state: RequestState) -> None:
        gathered = self.capture.gather(None, None)
        self.capture.end(gathered, req, state)
        self.capture.hand_over(gathered)

    def settled(self) -> None:
        """Until everything was copied, taken and given back."""
        eventually(lambda: not self.copier._queue and self.copier.held == 0)
        time.sleep(0.03)

    def trace(self) -> AssembledTrace:
        def taken() -> list[AssembledTrace]:
            with self._lock:
                return self.assembler.take_finished(1)

        return eventually(taken)[0]

    def close(self) -> None:
        self.copier.close()
        self.intake.close()
