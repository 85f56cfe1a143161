"""How should the threads of a step wait for each other? Alone, and beside other busy programs.

The layers and the head of the demo's target with random weights, two threads, in a process of its
own for each way to wait; *beside* two busy threads (nice 10) of another session. Milliseconds a
step. ``server`` is what ``aurora-sgl serve`` sets (``aurora_sgl/engine/openmp.py``).

    python benchmarks/cpu_waiting.py [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from itertools import chain
from statistics import median
from typing import Any

import torch

from aurora_sgl.engine.cpu import native
from aurora_sgl.engine.cpu.compiled_attention import ForwardPlan
from benchmarks.neighbours import busy
from benchmarks.servers import report

WAYS = {
    "OpenMP's own": {},
    "asleep": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "server": None,
}
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49_152
PLACES, LENGTH, SECONDS = 600, 128, 4.0


class Step:
    """One decode step of one request, through the compiled layers."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._library = native.library()
        if self._library is None:
            raise SystemExit("the compiled kernels are not to be had here: see aurora-sgl doctor")
        self._layers = [self._layer() for _ in range(LAYERS)]
        self._x, self._rest = self._make(1, HIDDEN), self._make(1, HIDDEN)
        self._head = self._make(VOCABULARY, HIDDEN)
        table = torch.randperm(PLACES).view(1, PLACES).to(torch.int32)
        length = torch.tensor([LENGTH])
        self._plan = ForwardPlan(table, torch.arange(1), length, window=0)
        self._position, self._slot = length - 1, table[0, length - 1].long()

    def _make(self, *shape: int) -> torch.Tensor:
        made = (torch.randn(*shape) * 0.05).to(torch.bfloat16)
        self._kept.append(made)
        return made

    def _layer(self) -> Any:
        angles = torch.randn(PLACES, DIM)
        self._kept.append(angles)
        weights = {
            name: self._make(*shape).data_ptr()
            for name, shape in {
                "norm": (HIDDEN,), "second_norm": (HIDDEN,), "post_norm": (HIDDEN,),
                "qkv": ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), "o": (HIDDEN, HEADS * DIM),
                "gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER),
                "keys": (PLACES, KV_HEADS, DIM), "values": (PLACES, KV_HEADS, DIM),
            }.items()
        }  # fmt: skip
        return native.Layer(
            **weights, angles=angles.data_ptr(), hidden=HIDDEN, inner=INNER, heads=HEADS,
            kv_heads=KV_HEADS, dim=DIM, rotary_dim=DIM, positions=PLACES, eps=1e-5,
            second_eps=1e-5, post_eps=1e-5, scale=DIM**-0.5, cap=0.0,
            kind=native.KINDS[torch.bfloat16], angles_kind=native.KINDS[torch.float32], neox=True,
        )  # fmt: skip

    def __call__(self) -> None:
        for layer in self._layers:
            self._library.aurora_layer(
                ctypes.addressof(layer), self._plan.address, self._position.data_ptr(),
                self._slot.data_ptr(), 1, self._x.data_ptr(), self._rest.data_ptr(),
                self._x.data_ptr(), None,
            )  # fmt: skip
        torch.nn.functional.linear(self._x, self._head)


def measure() -> None:
    """In the process whose environment says how threads wait: print the time of each step."""
    torch.set_num_threads(2)
    step = Step()
    for _ in range(5):
        step()
    times, until = [], time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        begun = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begun))
    print(json.dumps(times))


def steps(way: str) -> list[float]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    said = WAYS[way]
    first = "from aurora_sgl.engine.openmp import wait_politely; wait_politely(); "
    script = (
        f"{first if said is None else ''}import subprocess, sys; sys.exit(subprocess.call("
        "[sys.executable, '-m', 'benchmarks.cpu_waiting', '--measure']))"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.run(
        command, env={**environment, **(said or {})}, stdout=subprocess.PIPE, check=True
    )
    found: list[float] = json.loads(run.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure()
        return
    alone: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(given.rounds):
        for way in WAYS:
            alone[way].append(steps(way))
    beside = {}
    for way in WAYS:
        with busy():
            beside[way] = steps(way)
    rows = [
        {
            "threads wait": way,
            "alone: best of each round": ", ".join(f"{min(one):.1f}" for one in alone[way]),
            "alone: median": median(chain.from_iterable(alone[way])),
            "beside: median": median(beside[way]),
        }
        for way in WAYS
    ]
    report("How threads wait, ms a step", rows, as_json=given.json)


if __name__ == "__main__":
    main()
