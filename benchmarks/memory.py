"""Does the memory of server and sidecar grow? Short requests, many of them, recorded and captured.

The KV pool is filled once first: its pages become resident when they are first written, which
would look like growth for as long as it lasts. Then resident memory is read after every tenth of
the requests. The first tenth warms caches up; growth is the slope of a line through the rest,
per 1,000 requests.

    python benchmarks/memory.py [--requests 2000] [--json]
"""

from __future__ import annotations

import itertools
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from statistics import linear_regression

import httpx
import psutil

from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.processes.server import ServerProcess
from benchmarks.servers import arguments, ask, report, server, target


def resident(process: ServerProcess) -> tuple[float, float]:
    """MiB of the server's processes, and of the sidecar."""
    engine = sidecar = 0.0
    for one in process.family():
        try:
            mebibytes = one.memory_info().rss / 2**20
            if "aurora_sgl.sidecar" in " ".join(one.cmdline()):
                sidecar += mebibytes
            else:
                engine += mebibytes
        except psutil.NoSuchProcess:
            continue
    return engine, sidecar


def fill_the_pool(url: str) -> None:
    """Long prompts that share nothing, more of them than the pool of 8,192 tokens holds."""
    draw = random.Random(0)
    for _ in range(12):
        body = {
            "input_ids": [draw.randrange(1000, 20_000) for _ in range(900)],
            "sampling_params": {"temperature": 0, "max_new_tokens": 2},
        }
        httpx.post(f"{url}/generate", json=body, timeout=600).raise_for_status()


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--requests", type=int, default=2000)
    given = parser.parse_args()
    seen: list[tuple[int, float, float]] = []
    budget = {"AURORA_CAPTURE_BYTES": str(64 * 2**20), "AURORA_SPECULATION": "on"}
    with server(target(given), given.drafter, environment=budget) as (process, _):
        fill_the_pool(process.url)
        prompts = itertools.cycle(sample_prompts())
        tenth = given.requests // 10
        with ThreadPoolExecutor(8) as pool:
            for part in range(10):
                some = itertools.islice(prompts, tenth)
                list(pool.map(lambda prompt: ask(process.url, prompt, 8), some))
                seen.append(((part + 1) * tenth, *resident(process)))
                print(
                    "{} requests: server {:.0f} MiB, sidecar {:.0f} MiB".format(*seen[-1]),
                    file=sys.stderr,
                )
    rows = []
    for name, column in (("server", 1), ("sidecar", 2)):
        first, last = seen[0], seen[-1]
        line = linear_regression([at[0] for at in seen[1:]], [at[column] for at in seen[1:]])
        growth = line.slope * 1000
        rows.append(
            {
                "process": name,
                f"MiB after {first[0]}": first[column],
                f"MiB after {last[0]}": last[column],
                "growth, MiB per 1,000 requests": growth,
            }
        )
    report(f"memory over {given.requests} requests", rows, as_json=given.json)


if __name__ == "__main__":
    main()
