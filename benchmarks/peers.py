"""Tokens/s of others and of ours, for the same prompts and lengths, in one run on one machine.

Greedy answers of a fixed length to the demo's held-out prompts, from 1, 4 and 16 streams at once.
SGLang's rows are an unmodified SGLang without our plugin: *plain* on its ``torch_native``
attention; *NGRAM* and *static drafter* on its ``intel_amx`` backend, whose compiled kernels are on
no package index, so that they stand on our uncompiled ones. Hugging Face ``generate`` answers a
batch of as many prompts as there are streams. llama.cpp serves its own 4-bit GGUF file of the same
model, which is less work for each token. Who does not start is left out with a line that says why.
*Memory* is the proportional set size of all processes after the answers. All are started first and
then asked in turns, round after round, so that what else slows the machine meets them alike: a
ratio is the median over rounds of what two of them did in one round. Who is not asked sleeps.

    python -m benchmarks.peers --drafter DIR [--threads 1] [--only NAME,NAME] [--json]

``--drafter`` is a trained drafter's folder, for *static drafter* and *ours, drafts*. llama.cpp runs
in an environment of its own: ``python -m venv DIR; DIR/bin/pip install xllamacpp``, then
``--llama DIR/bin/python``; without it the row is left out.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
import psutil

from aurora_sgl.demo.model import gguf_file
from aurora_sgl.demo.prompts import Prompt, sample_prompts, to_measure
from aurora_sgl.errors import AuroraError
from aurora_sgl.processes.server import ServerProcess, free_port
from benchmarks.servers import arguments, ask, report, server, target

STREAMS = (1, 4, 16)
PLAIN, OURS, DRAFTS = "SGLang, plain", "ours, no drafts", "ours, drafts"
_FLAGS = ["--max-total-tokens", "24576", "--max-running-requests", "16", "--disable-radix-cache"]
_FLAGS += ["--sleep-on-idle"]
_AMX = ["--prefill-attention-backend", "intel_amx", "--decode-attention-backend", "intel_amx"]
_READY_SECONDS = 120.0
_DECIDE_SECONDS = 12.0  # the sidecar decides every five

#: Asks one prompt for that many tokens; returns how many came.
Ask = Callable[[Prompt, int], int]


def memory(process: psutil.Process) -> float:
    """Proportional set size of a process and its descendants, MiB."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


def speed(ask_one: Ask, prompts: list[Prompt], tokens: int, streams: int) -> float:
    """Tokens/s of ``streams`` streams that share out the prompts."""
    with ThreadPoolExecutor(streams) as pool:
        begun = time.perf_counter()
        came = sum(pool.map(lambda prompt: ask_one(prompt, tokens), prompts))
        return came / (time.perf_counter() - begun)


def load(streams: int) -> list[Prompt]:
    """Two prompts for each of few streams, one for each of sixteen."""
    count = {1: 2, 4: 8, 16: 16}[streams]
    return to_measure(sample_prompts())[:count]


# -- who is asked ----------------------------------------------------------------------------------


def _sglang(url: str, headers: dict[str, str]) -> Ask:
    def one(prompt: Prompt, tokens: int) -> int:
        return int(ask(url, prompt, tokens, **headers)["meta_info"]["completion_tokens"])

    return one


@contextmanager
def unmodified(model: Path, flags: list[str], threads: int) -> Iterator[tuple[Ask, psutil.Process]]:
    """SGLang with its plugins off."""
    with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder:
        process = ServerProcess(
            ["--model-path", str(model), "--device", "cpu", "--dtype", "bfloat16", *_FLAGS, *flags],
            port=free_port(),
            log=Path(folder) / "server.log",
            environment={
                "AURORA_ENABLED": "0",
                "AURORA_CPU": "1",
                "AURORA_CPU_COMPILED": "0",
                "SGLANG_USE_CPU_ENGINE": "1",
                "OMP_NUM_THREADS": str(threads),
                "AURORA_EXIT_WITH_PARENT": "1",
            },
        )
        process.start()
        try:
            process.wait_ready()
            yield _sglang(process.url, {}), psutil.Process(process.pid)
        finally:
            process.stop()


@contextmanager
def ours(
    model: Path, drafter: str | None, speculation: str, threads: int
) -> Iterator[tuple[Ask, psutil.Process]]:
    """Our server with everything as it is by default, but for ``AURORA_SPECULATION``.

    It first finds out, as a running server has, what steps with and without drafts take at each
    load and what the drafter brings; then what carries drafts is its own choice.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "AURORA_SPECULATION": speculation}
    with server(model, drafter, flags=_FLAGS, environment=environment) as (process, _):
        if speculation == "auto":
            for streams, wish in itertools.product(STREAMS, ("yes", "no")):
                headers = {"x-aurora-train": "no", "x-aurora-speculate": wish}
                speed(_sglang(process.url, headers), load(streams), 24, streams)
            time.sleep(_DECIDE_SECONDS)
        yield _sglang(process.url, {"x-aurora-train": "no"}), psutil.Process(process.pid)


@contextmanager
def llama_cpp(python: str, threads: int) -> Iterator[tuple[Ask, psutil.Process]]:
    """llama.cpp's server with the GGUF file that the demo's model comes from."""
    port = free_port()
    script = Path(__file__).with_name("llama_cpp_server.py")
    command = [python, str(script), str(gguf_file()), str(port), str(max(STREAMS)), str(threads)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"

    def one(prompt: Prompt, tokens: int) -> int:
        body = {
            **{"prompt": prompt.prompt, "n_predict": tokens, "temperature": 0},
            **{"ignore_eos": True, "cache_prompt": False},
        }
        answer = httpx.post(f"{url}/completion", json=body, timeout=600)
        answer.raise_for_status()
        return int(answer.json()["tokens_predicted"])

    try:
        _wait(url, process)
        yield one, psutil.Process(process.pid)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.terminate()
        process.wait(10)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _READY_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemExit("llama.cpp's server did not start")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit("llama.cpp's server was not ready in time")


@contextmanager
def hugging_face(
    model: Path, tokens: int, threads: int
) -> Iterator[tuple[Callable[[int], float], psutil.Process]]:
    """``generate`` in a process of its own; speed by streams."""
    code = f"import benchmarks.peers as p; p.generate({str(model)!r}, {tokens}, {threads})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    said, heard = process.stdin, process.stdout
    assert said is not None and heard is not None

    def at(streams: int) -> float:
        said.write(f"{streams}\n")
        return float(heard.readline())

    try:
        if heard.readline().strip() != "ready":
            raise SystemExit("Hugging Face did not start")
        yield at, psutil.Process(process.pid)
    finally:
        said.close()
        process.wait(30)


def generate(model: str, tokens: int, threads: int) -> None:
    """In the child: for each number of streams on stdin, prints tokens/s."""
    import aurora_sgl.compat  # noqa: F401, I001  (torchvision must import before transformers)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def answer(prompts: list[Prompt]) -> int:
        given = tokenizer([p.prompt for p in prompts], return_tensors="pt", padding=True)
        with torch.inference_mode():
            network.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return tokens * len(prompts)

    answer(load(1)[:1])
    print("ready", flush=True)
    for line in sys.stdin:
        streams = int(line)
        prompts, begun = load(streams), time.perf_counter()
        came = sum(answer(prompts[at : at + streams]) for at in range(0, len(prompts), streams))
        print(came / (time.perf_counter() - begun), flush=True)


# -- the table -------------------------------------------------------------------------------------


Found = dict[str, dict[int, list[float]]]  # tokens/s by name and streams, round after round


def measure(peers: dict[str, Callable[[int], float]], order: list[str], rounds: int) -> Found:
    """Ask everybody in turns, and say what each did."""
    found: Found = {name: {streams: [] for streams in STREAMS} for name in peers}
    for number, streams in itertools.product(range(1, rounds + 1), STREAMS):
        this_time: dict[str, list[float]] = {name: [] for name in peers}
        for name in order:
            came = peers[name](streams)
            this_time[name].append(came)
            said = f"round {number} of {rounds}, {streams} streams, {name}: {came:.1f} tokens/s"
            print(said, file=sys.stderr, flush=True)
        for name, values in this_time.items():
            found[name][streams].append(mean(values))
    return found


def rows(found: Found, memories: dict[str, float]) -> list[dict[str, Any]]:
    """One row a peer: median tokens/s, and medians over rounds of its ratio to SGLang's plain row
    and to ours without drafts."""
    table = []
    for name, values in found.items():
        row: dict[str, Any] = {"who": name}
        for streams in STREAMS:
            row[f"tokens/s, {streams}"] = median(values[streams])
        for over, base in (("plain", found.get(PLAIN)), ("ours", found.get(OURS))):
            for streams in STREAMS:
                pairs = zip(values[streams], base[streams], strict=True) if base else ()
                ratios = [mine / other for mine, other in pairs]
                row[f"/ {over}, {streams}"] = median(ratios) if ratios else float("nan")
        row["MiB"] = memories[name]
        table.append(row)
    return table


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=64, help="length of each answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--llama", help="Python of an environment that has xllamacpp")
    parser.add_argument("--only", default="", help="names, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=12, help="prompts asked before measuring")
    given = parser.parse_args()
    model, threads = target(given), given.threads
    spec = ["--speculative-algorithm"]
    tree = ["--speculative-num-steps", "3", "--speculative-eagle-topk", "4"]
    tree += ["--speculative-num-draft-tokens", "8"]
    starts: dict[str, Callable[[], Any]] = {
        PLAIN: partial(unmodified, model, ["--attention-backend", "torch_native"], threads),
        OURS: partial(ours, model, None, "off", threads),
    }
    if given.drafter:
        starts[DRAFTS] = partial(ours, model, given.drafter, "auto", threads)
        eagle = [*spec, "EAGLE3", "--speculative-draft-model-path", given.drafter, *tree, *_AMX]
        starts["SGLang, static drafter"] = partial(unmodified, model, eagle, threads)
    ngram = [*spec, "NGRAM", "--speculative-num-draft-tokens", "8", *_AMX]
    starts["SGLang, NGRAM"] = partial(unmodified, model, ngram, threads)
    if given.llama:
        starts["llama.cpp, Q4_1"] = partial(llama_cpp, given.llama, threads)
    starts["Hugging Face generate"] = partial(hugging_face, model, given.tokens, threads)
    chosen = [name.strip() for name in given.only.split(";") if name.strip()] or list(starts)
    order = [name for name in starts if name in chosen]
    order += [name for name in (DRAFTS, OURS) if name in chosen]  # twice, there and back
    title = f"tokens/s by streams at once, {threads} thread(s)"
    with ExitStack() as stack:
        peers: dict[str, Callable[[int], float]] = {}
        processes: dict[str, psutil.Process] = {}
        for name in dict.fromkeys(order):
            print(f"starting {name} ...", file=sys.stderr, flush=True)
            try:
                asked, processes[name] = stack.enter_context(starts[name]())
            except AuroraError as reason:  # SGLang's NGRAM needs a kernel that CPUs lack
                print(f"{name} is left out: {reason}", file=sys.stderr, flush=True)
                order = [one for one in order if one != name]
                continue
            if name == "Hugging Face generate":
                peers[name] = asked
                continue
            peers[name] = partial(_speed_at, asked, given.tokens)
            speed(asked, to_measure(sample_prompts())[-given.warm :], given.tokens, 4)
        found = measure(peers, order, given.rounds)
        memories = {name: memory(process) for name, process in processes.items()}
        report(title, rows(found, memories), as_json=given.json)


def _speed_at(asked: Ask, tokens: int, streams: int) -> float:
    return speed(asked, load(streams), tokens, streams)


if __name__ == "__main__":
    main()
