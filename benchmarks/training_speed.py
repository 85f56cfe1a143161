"""How many tokens a second does the trainer train, and in how much memory?

Two tables. *Training*: the trainer itself, one request an update or eight, on random requests
(random token ids and hidden states: the time does not depend on what they say, but for
``reach_kl``, which leaves out nearly every later row of an untrained drafter) of the demo's shape,
for a target of the demo's size (SmolLM2-135M) and, on a GPU, of an 8-billion one's. *Attention*:
forward and backward of one layer alone, without and with the diagonal of an unrolled step. Beside
our attention stand what others train drafters with: one masked call of PyTorch's
scaled_dot_product_attention over the text and the drafted rows of all queries, and on a GPU the
same as flex attention. The variants take turns and the medians are compared; on a CPU every
measurement is a process of its own, on a GPU every round. Memory is the peak above what was held
before.

    python benchmarks/training_speed.py [--device cpu|cuda] [--rounds 3] [--requests 16] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aurora_sgl.console import print_json, print_table
from aurora_sgl.drafter import attention
from aurora_sgl.drafter.architectures import one_layer
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3, Eagle3
from aurora_sgl.drafter.attention import Seen
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train

#: hidden, intermediate, heads, kv_heads, head_dim, vocabulary, draft vocabulary
SIZES = {
    "demo": (576, 1536, 9, 3, 64, 49_152, 8_192),
    "8b": (4096, 14_336, 32, 8, 128, 128_256, 32_000),
}
PROMPT, ANSWER = (20, 120), (60, 128)  # tokens of the demo's requests
LENGTHS = {"cpu": (128, 256, 512), "cuda": (512, 2048)}
MIB = 1024**2


@dataclass(frozen=True)
class Job:
    what: str  # training or attention
    device: str
    size: str
    attention: str  # a backend of ours, or a rival
    dtype: str  # bfloat16: autocast in training
    requests: int = 0
    length: int = 0
    own: int = 0
    threads: int = 1
    batch: int = 1  # requests of one update of training
    objective: str = "forward_kl"


def jobs(device: str, requests: int, threads: int) -> list[Job]:
    gpu = device == "cuda"
    ours = ["flashinfer", "sdpa"] if gpu else ["sdpa"]
    rivals = ["masked sdpa", "flex"] if gpu else ["masked sdpa"]
    found = []
    for size in ("demo", "8b") if gpu else ("demo",):
        for name in [*ours, *rivals]:
            found.append(Job("training", device, size, name, "bfloat16", requests, threads=threads))
        found.append(Job("training", device, size, "sdpa", "float32", requests, threads=threads))
        for batch, objective in ((8, "forward_kl"), (1, "reach_kl"), (8, "reach_kl")):
            found.append(
                Job(
                    "training", device, size, ours[0], "bfloat16", requests, threads=threads,
                    batch=batch, objective=objective,
                )
            )  # fmt: skip
        for length in LENGTHS[device]:
            for own in (0, 2):
                for name in [*ours, *rivals]:
                    found.append(
                        Job(
                            "attention", device, size, name, "bfloat16",
                            length=length, own=own, threads=threads,
                        )
                    )  # fmt: skip
    return found


# What others do: every drafted row of every query is a key, and a mask leaves each query its own.


def _keys(text: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """Text rows, then the first drafted row of all queries, then the second ... [1, heads, ...]"""
    drafted = [] if own is None else [own.transpose(0, 1).flatten(0, 1)]
    return torch.cat((text, *drafted)).transpose(0, 1)[None]


def _last_rows(visible: torch.Tensor | Seen, device: torch.device) -> torch.Tensor:
    """Of each query of one request, as training hands it over or as this file does."""
    if isinstance(visible, torch.Tensor):
        return visible
    ((queries, text, mask),) = visible.requests()
    if mask is not None:
        return mask.sum(-1) - 1
    count, length = queries.stop - queries.start, text.stop - text.start
    return torch.arange(length - count, length, device=device)


def masked_sdpa(
    query: torch.Tensor,
    text_key: torch.Tensor,
    text_value: torch.Tensor,
    visible: torch.Tensor | Seen,
    own_key: torch.Tensor | None = None,
    own_value: torch.Tensor | None = None,
) -> torch.Tensor:
    last_row = _last_rows(visible, query.device)
    mask = torch.arange(len(text_key), device=query.device) <= last_row[:, None]
    if own_key is not None:
        diagonal = torch.eye(len(query), dtype=torch.bool, device=query.device)
        mask = torch.cat((mask, *[diagonal] * own_key.shape[1]), 1)
    key, value = _keys(text_key, own_key), _keys(text_value, own_value)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, attn_mask=mask, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask)


def flex(
    query: torch.Tensor,
    text_key: torch.Tensor,
    text_value: torch.Tensor,
    visible: torch.Tensor | Seen,
    own_key: torch.Tensor | None = None,
    own_value: torch.Tensor | None = None,
) -> torch.Tensor:
    last_row = _last_rows(visible, query.device)
    attend, block_mask = _compiled()
    text, queries = len(text_key), len(query)

    def seen(b: Any, h: Any, q: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return ((row < text) & (row <= last_row[q])) | (
            (row >= text) & ((row - text) % queries == q)
        )

    key, value = _keys(text_key, own_key), _keys(text_value, own_value)
    mask = block_mask(seen, None, None, queries, key.shape[2], device=str(query.device))
    out = attend(query.transpose(0, 1)[None], key, value, block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


RIVALS = {"masked sdpa": masked_sdpa, "flex": flex}


def run(job: Job) -> dict[str, float]:
    """One measurement, in this process."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    if job.attention in RIVALS:
        rival = RIVALS[job.attention]
        with patch.object(one_layer, "attend", rival):
            return _training(job) if job.what == "training" else _attention(job, rival)
    with attention.using(job.attention):
        return _training(job) if job.what == "training" else _attention(job, attention.attend)


def _training(job: Job) -> dict[str, float]:
    hidden, intermediate, heads, kv_heads, head_dim, vocab, draft_vocab = SIZES[job.size]
    drafter = Eagle3(
        DrafterConfig(
            EAGLE3, hidden, intermediate, heads, kv_heads, head_dim, vocab, draft_vocab,
            1e-5, 1e5, 4096, aux_layers=(2, 15, 27),
        )
    )  # fmt: skip
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    drafter.t2d[:draft_vocab] = True
    embedding = (0.05 * torch.randn(vocab, hidden)).bfloat16()
    head = TargetHead(embedding, embedding)
    settings = TrainSettings(
        passes=1, device=job.device, threads=job.threads, autocast=job.dtype == "bfloat16",
        batch_requests=job.batch, objective=job.objective,
    )  # fmt: skip
    warm_up, data = _requests(job, 2, seed=1), _requests(job, job.requests, seed=0)
    before = _reset_peak(job.device)
    train(drafter, warm_up, head, settings)  # kernels that are chosen or compiled on first use
    result = train(drafter, data, head, settings)
    return {
        "tokens_per_second": float(result.metrics["tokens_per_second"]),
        "peak_mib": (_peak(job.device) - before) / MIB,
    }


def _requests(job: Job, count: int, seed: int) -> list[Sequence]:
    hidden, *_, draft_vocab = SIZES[job.size]
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        prompt, answer = rng.randint(*PROMPT), rng.randint(*ANSWER)
        rows = prompt + answer - 1
        made.append(
            Sequence(
                number,
                torch.randint(0, draft_vocab, (rows + 1,), generator=generator),
                torch.randn(rows, 3 * hidden, generator=generator).bfloat16(),
                torch.randn(rows, hidden, generator=generator).bfloat16(),
                prompt,
            )
        )
    return made


def _attention(job: Job, attend: Callable[..., torch.Tensor]) -> dict[str, float]:
    _, _, heads, kv_heads, head_dim, *_ = SIZES[job.size]
    device, length = torch.device(job.device), job.length
    dtype = getattr(torch, job.dtype)
    shapes: list[tuple[int, ...]] = [(length, heads), (length, kv_heads), (length, kv_heads)]
    shapes += [(length, job.own, kv_heads)] * (2 if job.own else 0)
    inputs = [
        torch.randn(*shape, head_dim, device=device, dtype=dtype).requires_grad_()
        for shape in shapes
    ]
    last_row = torch.arange(length, device=device)
    grad = torch.randn(length, heads, head_dim, device=device, dtype=dtype)

    def once() -> float:
        _wait(job.device)
        began = time.perf_counter()
        out = attend(*inputs[:3], last_row, *inputs[3:])
        torch.autograd.grad(out, inputs, grad)
        _wait(job.device)
        return time.perf_counter() - began

    before = _reset_peak(job.device)
    for _ in range(3):
        once()
    took = statistics.median(once() for _ in range(20))
    return {"milliseconds": 1000 * took, "peak_mib": (_peak(job.device) - before) / MIB}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> int:
    """Bytes that are held now; the peak counts from here."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(some: list[Job]) -> list[dict[str, float] | str]:
    """Measurements in one process of their own, each perhaps the last line that it failed with."""
    ended = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps([asdict(job) for job in some])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(some[0].threads)},
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("measured ")]
    found: list[dict[str, float] | str] = [json.loads(line[9:]) for line in lines]
    why = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
    return found + [why] * (len(some) - len(found))


def _measured(given: str) -> None:
    """In that process: a line for each."""
    for fields in json.loads(given):
        found: dict[str, float] | str
        try:
            found = run(Job(**fields))
        except Exception as error:
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        print("measured", json.dumps(found), flush=True)


def rows_of(job_list: list[Job], rounds: int) -> list[dict[str, Any]]:
    """Medians over the rounds; ``ratio`` compares with the first variant of the same table cell."""
    taken: dict[Job, list[dict[str, float]]] = {job: [] for job in job_list}
    failed: dict[Job, str] = {}
    for _ in range(rounds):
        left = [job for job in job_list if job not in failed]
        parts = [left] if left and left[0].device == "cuda" else [[job] for job in left]
        for part in parts:
            for job, found in zip(part, measure(part), strict=True):
                if isinstance(found, str):
                    failed[job] = found
                else:
                    taken[job].append(found)
    rows: list[dict[str, Any]] = []
    best: dict[tuple[Any, ...], float] = {}
    for job, all_found in taken.items():
        row: dict[str, Any] = asdict(job)
        if job in failed:
            rows.append({**row, "failed": failed[job]})
            continue
        row |= {name: statistics.median(one[name] for one in all_found) for name in all_found[0]}
        speed = row.get("tokens_per_second") or 1 / row["milliseconds"]
        first = best.setdefault((job.what, job.size, job.length, job.own), speed)
        rows.append({**row, "ratio": speed / first})
    return rows


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    return name.strip() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16, help="a measurement of training")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        _measured(given.measure)
        return
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = rows_of(jobs(device, given.requests, given.threads), given.rounds)
    if given.json:
        print_json({"machine": machine(device), "torch": torch.__version__, "rows": rows})
        return
    for what, columns in (
        ("training", {"trained tokens/s": "tokens_per_second"}),
        ("attention", {"rows": "length", "drafted": "own", "ms": "milliseconds"}),
    ):
        part = [row for row in rows if row["what"] == what]
        columns = {
            "target": "size", "attention": "attention", "dtype": "dtype", "batch": "batch",
            "loss": "objective", **columns,
            "ratio": "ratio", "peak MiB": "peak_mib", "failed": "failed",
        }  # fmt: skip
        varying = {key for key in columns.values() if len({str(r.get(key)) for r in part}) > 1}
        columns = {heading: key for heading, key in columns.items() if key in varying}
        print_table(f"{what.capitalize()}, {machine(device)}", columns, part)


if __name__ == "__main__":
    main()
