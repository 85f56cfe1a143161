"""How long does a swap hold up a running stream? Aim: no gap above twice the median step.

Streams run all the time while two versions of a drafter go live in turn. Around each swap the
longest gap between two verify steps of any stream is set against the median gap of the whole run,
twice: between the times that SGLang's scheduler recorded, and as the client sees it, behind the
detokenizer, the HTTP server and the network. Windows in which a stream began a new answer are left
out: a prefill holds up the other streams with and without a swap.

    python benchmarks/swap_stall.py [--swaps 50] [--streams 2] [--tokens 600] [--json]
"""

from __future__ import annotations

import itertools
import shutil
import sys
import threading
import time
from pathlib import Path
from statistics import median

import httpx
from safetensors.torch import load_file, save_file

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.store import queries
from benchmarks.servers import (
    arguments,
    first_live,
    put_live,
    report,
    server,
    sglang_flags,
    target,
)

TOKENS = 600  # of one answer: prefills are rare, and attention is not what a step is made of;
# a GPU makes as many in half a second, so there ask for more


class Stream(threading.Thread):
    """Asks for one long answer after another and notes when tokens arrive."""

    def __init__(self, url: str, number: int, tokens: int = TOKENS) -> None:
        super().__init__(daemon=True)
        self.url, self.number, self.tokens = url, number, tokens
        self.arrivals: list[float] = []
        self.breaks: list[int] = [0]  # where a new answer begins
        self.failed = 0
        self.stopping = False

    def run(self) -> None:
        prompts = sample_prompts()
        at = self.number * 50
        while not self.stopping:
            at += 1
            body = {
                "text": prompts[at % len(prompts)].prompt,
                "stream": True,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": self.tokens,
                    "ignore_eos": True,
                },
            }
            try:
                with httpx.stream("POST", f"{self.url}/generate", json=body, timeout=120) as answer:
                    for line in answer.iter_lines():
                        if self.stopping:
                            break
                        if line.startswith("data: {"):
                            self.arrivals.append(time.perf_counter())
                    self.failed += answer.status_code != 200
            except httpx.HTTPError:
                self.failed += not self.stopping
            self.breaks.append(len(self.arrivals))

    def gaps(self) -> list[tuple[float, float]]:
        """(end, length) of every gap within an answer."""
        fresh = set(self.breaks)
        return [
            (b, b - a)
            for i, (a, b) in enumerate(zip(self.arrivals, self.arrivals[1:], strict=False), 1)
            if i not in fresh
        ]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of one answer")
    parser.add_argument("--quiet", type=float, default=8.0, help="seconds without a swap first")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    given = parser.parse_args()
    environment = {"AURORA_SPECULATION": "on"}
    started = server(
        target(given), given.drafter, flags=sglang_flags(given), environment=environment
    )
    with started as (process, home):
        engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
        group_id, server_id, first = first_live(engine)
        versions = [first, _relative(engine, home, group_id, first)]
        size = (home / "relative" / "model.safetensors").stat().st_size
        streams = [Stream(process.url, n, given.tokens) for n in range(given.streams)]
        for stream in streams:
            stream.start()
        time.sleep(given.quiet)
        windows: list[tuple[float, float]] = []
        for number in range(given.swaps):
            wanted = versions[(number + 1) % 2]
            begun = time.perf_counter()
            put_live(engine, server_id, wanted)
            windows.append((begun, time.perf_counter()))
            if number % 10 == 9:
                print(f"swap {number + 1}/{given.swaps}", file=sys.stderr)
            time.sleep(0.5)
        for stream in streams:
            stream.stopping = True
        for stream in streams:
            stream.join()
        time.sleep(3)  # the last records reach the store
        seen = [gap for stream in streams for gap in stream.gaps()]
        made, begins = _made(engine, server_id)
        begins += [stream.arrivals[at] for stream in streams for at in stream.breaks[:-1]]
        if given.streams == 1:  # nobody waits for another's prefill
            begins = []
        quiet = [(a, b + 0.3) for a, b in windows if not any(a - 1 <= t <= b + 0.3 for t in begins)]
        row = {
            "drafter MB": size / 1e6,
            "seconds a swap": median(b - a for a, b in windows),
            "swaps": given.swaps,
            "streams": given.streams,
            "compared": len(quiet),
            "failed": sum(stream.failed for stream in streams),
        }
        rows = [
            {"seen by": name, **_compare(gaps, quiet), **row}
            for name, gaps in (("scheduler", made), ("client", seen))
        ]
    title = "longest gap at a swap, in median steps (aim: max <= 2, 0 failed)"
    report(title, rows, as_json=given.json, keep="swap stall" if given.keep else "")


def _compare(
    gaps: list[tuple[float, float]], windows: list[tuple[float, float]]
) -> dict[str, float]:
    """Longest gap of each window against the median gap."""
    step = median(length for _, length in gaps)
    longest = sorted(
        max((g for end, g in gaps if begun <= end <= done), default=0.0) / step
        for begun, done in windows
    )
    inside, outside = [], []
    for end, gap in gaps:
        within = any(begun <= end <= done for begun, done in windows)
        (inside if within else outside).append(gap / step)
    outside.sort()
    return {
        "step ms": 1000 * step,
        "median": median(longest),
        "p99": longest[int(0.99 * (len(longest) - 1))],
        "max": longest[-1],
        "steps": len(inside),
        "over 2": sum(gap > 2 for gap in inside) / max(1, len(inside)),
        "p99 without": outside[int(0.99 * (len(outside) - 1))],
        "max without": outside[-1],
        "over 2 without": sum(gap > 2 for gap in outside) / len(outside),
    }


def _made(engine, server_id: int) -> tuple[list[tuple[float, float]], list[float]]:
    """Gaps between verify steps, and when a request's first step was, on the client's clock."""
    ahead = time.time() - time.perf_counter()
    with store.session(engine, write=False) as s:
        times = [[at.timestamp() - ahead for at in one] for one in
                 queries.events.step_moments(s, server_id).values()]  # fmt: skip
    gaps = [(b, b - a) for one in times for a, b in itertools.pairwise(one)]
    return gaps, [one[0] for one in times]


def _relative(engine, home: Path, group_id: int, version_id: int) -> int:
    """A version whose weights differ a little from another's."""
    artifacts = ArtifactRoot(str(home / "artifacts"))
    with store.session(engine, write=False) as s:
        uri = queries.versions.version(s, version_id).weights_uri
    folder = home / "relative"
    shutil.copytree(artifacts.local_path(uri), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensors[name] = (tensor.float() * 0.99).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return import_version(engine, artifacts, folder, group_id).id


if __name__ == "__main__":
    main()
