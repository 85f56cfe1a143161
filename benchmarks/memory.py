"""Does the memory of server and sidecar grow? Short requests, many of them, recorded and captured.

Resident memory is read after every tenth of the requests. The first tenth warms caches up; growth
is what comes after it, per 1,000 requests.

    python benchmarks/memory.py [--requests 2000] [--json]
"""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil

from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.engine.process import ServerProcess
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


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--requests", type=int, default=2000)
    given = parser.parse_args()
    seen: list[tuple[int, float, float]] = []
    budget = {"AURORA_CAPTURE_BYTES": str(64 * 2**20), "AURORA_SPECULATION": "on"}
    with server(target(given), given.drafter, environment=budget) as (process, _):
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
        growth = (last[column] - first[column]) / (last[0] - first[0]) * 1000
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
