"""How much of its speed does serving keep while a training run goes on beside it? Aim: >= 0.80.

A server answers prompts on `--streams` streams; a real training run on what it served starts beside
it, as the scheduler starts one, at the recipe's niceness and thread limit. The run is then stopped
and let go on (SIGSTOP, SIGCONT) from window to window, in an order that gives each state the same
place, so that both see the same server, prompts and minute. A pair of windows gives one ratio; the
table shows the median over pairs and its 95% bootstrap interval.

    python benchmarks/beside_training.py [--pairs 12] [--streams 2] [--json]
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from aurora_sgl.demo.prompts import Prompt, sample_prompts
from aurora_sgl.training.settings import TrainSettings
from benchmarks.recording import interval
from benchmarks.servers import arguments, ask, report, server, target


def window(url: str, prompts: Iterator[Prompt], streams: int, tokens: int) -> float:
    """Tokens/s over one prompt a stream."""
    some = list(itertools.islice(prompts, streams))
    begun = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(lambda prompt: ask(url, prompt, tokens), some))
    return streams * tokens / (time.perf_counter() - begun)


def start_training(home: Path, model: Path) -> subprocess.Popen[str]:
    """A run that outlasts the measurement; returns when its first update is done."""
    settings = TrainSettings(passes=2000, min_requests=4, gate_share=0.0, resume=False)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "aurora_sgl.training", "--trigger", "benchmark"),
            *("--target", str(model), "--settings", settings.model_dump_json()),
        ],
        env={**os.environ, "AURORA_HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if '"update"' in line:
            return process
    raise SystemExit(f"the training run ended: {process.communicate()[0]}")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    model = target(given)
    speeds: dict[str, list[float]] = {"alone": [], "beside training": []}
    environment = {"AURORA_SPECULATION": "on"}
    with server(model, given.drafter, environment=environment) as (process, home):
        prompts = itertools.cycle(sample_prompts())
        for _ in range(8):
            window(process.url, prompts, given.streams, given.tokens)
        time.sleep(3)  # until the traces are stored
        training = start_training(home, model)
        drain = ThreadPoolExecutor(1).submit(lambda: [line for line in training.stderr or ()])
        try:
            for pair in range(given.pairs):
                order = ("alone", "beside training")[:: 1 if pair % 2 else -1]
                for state in order:
                    stop = signal.SIGSTOP if state == "alone" else signal.SIGCONT
                    os.killpg(training.pid, stop)
                    time.sleep(0.5)
                    speed = window(process.url, prompts, given.streams, given.tokens)
                    speeds[state].append(speed)
                if training.poll() is not None:
                    raise SystemExit("the training run ended before the measurement did")
                print(f"pair {pair + 1}/{given.pairs}", file=sys.stderr)
        finally:
            os.killpg(training.pid, signal.SIGCONT)
            os.killpg(training.pid, signal.SIGKILL)
            updates = [line for line in drain.result() if '"update"' in line]
    done = json.loads(updates[-1]) if updates else {}
    ratios = [b / a for a, b in zip(speeds["alone"], speeds["beside training"], strict=True)]
    low, high = interval(ratios)
    row = {
        "streams": given.streams,
        "tokens/s alone": median(speeds["alone"]),
        "tokens/s beside training": median(speeds["beside training"]),
        "ratio (median)": median(ratios),
        "95% from": low,
        "95% to": high,
        "trained tokens/s": done.get("tokens", 0) / max(1e-9, done.get("seconds", 0)),
    }
    report("serving beside training (aim: >= 0.80)", [row], as_json=given.json)


if __name__ == "__main__":
    main()
