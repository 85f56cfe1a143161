"""What a swap takes of the scheduler's thread: how long each step waits, and how many do.

Without a server: a drafter of random weights in SGLang's layout, the swap's driver between steps
that do nothing, and the sidecar's part in its place. A step's wait is measured by the clock, and by
the thread's own processor time, which other processes on this machine do not change.

    python -m benchmarks.swap_work [--sizes small,1gb,3gb] [--swaps 3] [--json]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aurora_sgl import wire
from aurora_sgl.drafter.checkpoint import WEIGHTS, content_sha256
from aurora_sgl.engine.draft_kv import LiveVersion
from aurora_sgl.engine.swap import Swapper
from aurora_sgl.engine.swap_driver import SwapDriver
from benchmarks.servers import report

MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Sizes:
    """Of an EAGLE3 drafter of one layer."""

    hidden: int
    inner: int
    key_values: int
    vocabulary: int  # that it drafts

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As a file names them."""
        hidden, inner, kv = self.hidden, self.inner, self.key_values
        return {
            "fc.weight": (hidden, 3 * hidden),
            "midlayer.self_attn.q_proj.weight": (hidden, 2 * hidden),
            "midlayer.self_attn.k_proj.weight": (kv, 2 * hidden),
            "midlayer.self_attn.v_proj.weight": (kv, 2 * hidden),
            "midlayer.self_attn.o_proj.weight": (hidden, hidden),
            "midlayer.mlp.gate_proj.weight": (inner, hidden),
            "midlayer.mlp.up_proj.weight": (inner, hidden),
            "midlayer.mlp.down_proj.weight": (hidden, inner),
            "midlayer.input_layernorm.weight": (hidden,),
            "midlayer.hidden_norm.weight": (hidden,),
            "midlayer.post_attention_layernorm.weight": (hidden,),
            "norm.weight": (hidden,),
            "lm_head.weight": (self.vocabulary, hidden),
        }


SIZES = {
    "small": Sizes(576, 1536, 192, 8192),
    "1gb": Sizes(4096, 14336, 1024, 50_000),
    "3gb": Sizes(7168, 20480, 1024, 100_000),
}


class Fused(torch.nn.Module):
    """SGLang's layout: rows of several tensors of the file in one parameter."""

    def __init__(self, rows: dict[Any, int], width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.zeros(sum(rows.values()), width, dtype=torch.bfloat16), requires_grad=False
        )
        first = dict(
            zip(rows, (sum(list(rows.values())[:i]) for i in range(len(rows))), strict=True)
        )

        def load(parameter: torch.nn.Parameter, loaded: torch.Tensor, shard: Any) -> None:
            part = parameter.data.narrow(0, first[shard], rows[shard])
            assert part.shape == loaded.shape
            part.copy_(loaded)

        self.weight.weight_loader = load  # type: ignore[attr-defined]


def model_of(sizes: Sizes) -> torch.nn.Module:
    """Parameters under the names of SGLang's drafter."""
    model = torch.nn.Module()
    shapes = sizes.shapes()
    fused = {
        "qkv_proj": Fused(
            {"q": sizes.hidden, "k": sizes.key_values, "v": sizes.key_values}, 2 * sizes.hidden
        ),
        "gate_up_proj": Fused({0: sizes.inner, 1: sizes.inner}, sizes.hidden),
    }
    layer = torch.nn.Module()
    layer.self_attn, layer.mlp = torch.nn.Module(), torch.nn.Module()
    layer.self_attn.qkv_proj, layer.mlp.gate_up_proj = fused.values()
    body = torch.nn.Module()
    body.layers = torch.nn.ModuleList([layer])
    model.model = body
    for name, shape in shapes.items():
        if any(f".{part}_proj." in name for part in ("q", "k", "v", "gate", "up")):
            continue
        *path, leaf = name.replace("midlayer", "layers.0").split(".")
        owner: Any = model if path == ["lm_head"] else body
        for one in path:
            if not hasattr(owner, one):
                setattr(owner, one, torch.nn.Module())
            owner = getattr(owner, one)
        value = torch.zeros(shape, dtype=torch.bfloat16)
        setattr(owner, leaf, torch.nn.Parameter(value, requires_grad=False))
    return model


def write_weights(sizes: Sizes, folder: Path, seed: int) -> str:
    """A file of random weights; returns its content hash."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).bfloat16()
    tensors = {}
    for index, (name, shape) in enumerate(sizes.shapes().items()):
        count = torch.Size(shape).numel()
        tensors[name] = block.roll(index).repeat(-(-count // len(block)))[:count].reshape(shape)
    save_file(tensors, folder / WEIGHTS)
    return content_sha256(tensors)


class Rig:
    """A driver, and the sidecar's part, whose time is not counted."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.folder = sizes, Path()
        swapper = Swapper(model_of(sizes), torch.nn.Linear(2, 2), None, sizes.vocabulary)
        self.heard: list[wire.Record] = []
        self.driver = SwapDriver(swapper, LiveVersion(), 1, tp_size=1, report=self.heard.append)
        self.waits: list[tuple[float, float]] = []  # by the clock, by processor time
        self.apply = (0.0, 0.0)

    def timed(self, work: Callable[[], None]) -> tuple[float, float]:
        wall, own = time.perf_counter(), time.thread_time()
        work()
        return 1000 * (time.perf_counter() - wall), 1000 * (time.thread_time() - own)

    def swap(self, version_id: int) -> None:
        """One swap, from the command to the answer. Fails when the hash is another."""
        folder = Path(tempfile.mkdtemp(prefix="aurora-bench-", dir=MEMORY))
        try:
            sha256 = write_weights(self.sizes, folder, version_id)
            self.driver.ask(wire.Stage(version_id, str(folder), sha256, 0))
            while not self.heard or not isinstance(self.heard[-1], wire.SwapDone):
                self._step()
                if self.heard and isinstance(self.heard[-1], wire.LiveCopied):
                    self.heard.clear()
                    live = content_sha256(load_file(folder / WEIGHTS))
                    self.driver.hashed(wire.LiveHash(version_id, live))
            done = self.heard.pop()
            assert isinstance(done, wire.SwapDone) and done.ok and done.live_sha256 == sha256, done
        finally:
            shutil.rmtree(folder)

    def _step(self) -> None:
        command = self.driver.next_command()
        wait = self.timed(self.driver.work)
        if command is not None:
            obeyed = self.timed(lambda: self.driver.obey(command))
            self.apply = max(self.apply, obeyed)
            wait = (wait[0] + obeyed[0], wait[1] + obeyed[1])
        self.waits.append(wait)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--sizes", default="small,1gb,3gb")
    parser.add_argument("--swaps", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in given.sizes.split(","):
        rig = Rig(SIZES[name])
        for version_id in range(1, given.swaps + 1):
            rig.swap(version_id)
        clock, own = zip(*rig.waits, strict=True)
        size = sum(torch.Size(shape).numel() * 2 for shape in SIZES[name].shapes().values())
        rows.append(
            {
                "drafter MB": size / 1e6,
                "swaps": given.swaps,
                "steps a swap": len(rig.waits) / given.swaps,
                "ms a step, median": median(clock),
                "max": max(clock),
                "processor, median": median(own),
                "processor, max": max(own),
                "going live, max": rig.apply[0],
            }
        )
        del rig
    report("what a step waits for a swap", rows, as_json=given.json)


if __name__ == "__main__":
    main()
