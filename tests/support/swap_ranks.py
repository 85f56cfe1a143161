"""Run by test_engine_swap_ranks: one rank of two that swap, with SGLang's own process groups."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from aurora_sgl import wire  # noqa: E402
from aurora_sgl.engine import swap_driver  # noqa: E402
from aurora_sgl.engine.cpu import linear  # noqa: E402
from aurora_sgl.engine.draft_kv import LiveVersion  # noqa: E402
from aurora_sgl.engine.parts import Parts  # noqa: E402
from aurora_sgl.engine.swap import Swapper  # noqa: E402


def join(root: Path, rank: int) -> None:
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path=str(root), device="cpu", skip_tokenizer_init=True, tp_size=2)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=rank))
    init_distributed_environment(
        world_size=2,
        rank=rank,
        local_rank=rank,
        backend="gloo",
        distributed_init_method=f"file://{root / 'rendezvous'}",
    )
    initialize_model_parallel()


def drafter_of_sglang() -> torch.nn.Module:
    """Each kind of layer that the ranks divide, and one that they don't."""
    from sglang.srt.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    drafter = torch.nn.Module()
    drafter.fc = torch.nn.Linear(4, 4)
    drafter.self_attn, drafter.mlp = torch.nn.Module(), torch.nn.Module()
    drafter.self_attn.qkv_proj = QKVParallelLinear(4, 4, 4, 2, bias=False)
    drafter.mlp.gate_up_proj = MergedColumnParallelLinear(4, [6, 6], bias=False)
    drafter.mlp.down_proj = RowParallelLinear(6, 4, bias=False)
    drafter.lm_head = ParallelLMHead(100, 4)
    return drafter.requires_grad_(False)


def is_shard(drafter: torch.nn.Module, whole: dict[str, torch.Tensor], rank: int) -> bool:
    """Whether it holds this rank's halves, as SGLang's layers divide them."""

    def half(name: str, dim: int = 0) -> torch.Tensor:
        return whole[f"{name}.weight"].chunk(2, dim)[rank]

    attend, mlp = drafter.self_attn, drafter.mlp
    wanted = [
        (drafter.fc.bias, whole["fc.bias"]),
        (attend.qkv_proj.weight, torch.cat([half(f"self_attn.{one}_proj") for one in "qkv"])),
        (
            mlp.gate_up_proj.weight,
            torch.cat([half(f"mlp.{one}_proj") for one in ("gate", "up")]),
        ),
        (mlp.down_proj.weight, half("mlp.down_proj", 1)),
    ]
    head = drafter.lm_head.weight  # of a vocabulary that is padded to 128
    rows = whole["lm_head.weight"][64 * rank : 64 * (rank + 1)]
    wanted.append((head[: len(rows)], rows))
    return all(torch.equal(a, b) for a, b in wanted) and not head[len(rows) :].any()


def fail(*_: object) -> None:
    raise RuntimeError("broken on purpose")


def broken(driver: swap_driver.SwapDriver, swapper: Swapper, case: str) -> Any:
    """In the middle of what does one rank break?"""
    if case == "no word":
        return mock.patch.object(driver, "_stands", fail)
    if case == "staging breaks":  # behind the first tensors
        return mock.patch.object(swapper, "_pack", fail)
    if case == "apply fails":  # behind the first parameters
        outcomes = [None, RuntimeError("broken on purpose"), None, None]
        return mock.patch.object(linear, "moved", mock.Mock(side_effect=outcomes))
    return nullcontext()


def swap(root: Path, rank: int) -> None:
    join(root, rank)
    drafter = drafter_of_sglang()
    swapper = Swapper(drafter, torch.nn.Linear(2, 2), None, 40)
    said: list[wire.Record] = []
    driver = swap_driver.SwapDriver(swapper, LiveVersion(), 7, tp_size=2, report=said.append)
    parts = Parts({})

    def obey(command: swap_driver.StageSwap | swap_driver.ApplySwap) -> None:
        parts.attempt("swapping", lambda: driver.obey(command), None, always=True)

    versions = {}
    for number, (case, sha) in enumerate(json.loads((root / "cases.json").read_text()), 1):
        path = str(root / "weights.safetensors")
        if rank == 1 and case == "no file":
            path = str(root / "nowhere")
        if rank == 1 and case == "no text":
            path = None  # type: ignore[assignment]
        stage, apply = swap_driver.StageSwap(number, path, sha), swap_driver.ApplySwap(number)
        if rank == 1 and case == "no agent":
            swap_driver.abstain(stage)
            swap_driver.abstain(apply)
        else:
            with broken(driver, swapper, case if rank == 1 else ""):
                obey(stage)
                while swapper.busy:
                    driver.work()
                obey(apply)
            while swapper.busy or driver._answer:
                driver.work()
        while rank == 0 and len(said) < number:
            time.sleep(0.01)
        versions[case] = driver._live.version_id
    done = [one.ok for one in said if isinstance(one, wire.SwapDone)]
    right = is_shard(drafter, load_file(root / "weights.safetensors"), rank)
    word = {"live": versions, "ok": done[: len(versions)], "right": right}
    (root / f"said-{rank}.json").write_text(json.dumps(word))


def main() -> int:
    """Both ranks are children of this process, which imports SGLang for them."""
    import sglang.srt.distributed
    import sglang.srt.layers.linear
    import sglang.srt.layers.vocab_parallel_embedding
    import sglang.srt.server_args  # noqa: F401

    root, ranks = Path(sys.argv[1]), []
    for rank in range(2):
        child = os.fork()
        if not child:
            swap(root, rank)
            os._exit(0)
        ranks.append(child)
    return int(any([os.waitpid(child, 0)[1] for child in ranks]))


if __name__ == "__main__":
    raise SystemExit(main())
