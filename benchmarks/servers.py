"""What the benchmarks with a running server share: starting one, asking it, printing a table."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import Settings
from aurora_sgl.console import print_table
from aurora_sgl.demo.model import demo_model
from aurora_sgl.demo.prompts import Prompt, sample_prompts
from aurora_sgl.engine.flags import server_flags
from aurora_sgl.processes.server import ServerProcess, free_port
from aurora_sgl.rollout.promote import promote
from aurora_sgl.serving import plan, runs_on_cpu
from aurora_sgl.store import queries
from benchmarks.results import Cells

PATIENCE = (
    900.0  # seconds that one swap may take: 1 GB takes minutes before a benchmark is given up
)
_READY_SECONDS = 420.0  # on a GPU kernels are compiled when they are first used


def arguments(description: str) -> argparse.ArgumentParser:
    """``--json``, ``--model``, ``--drafter`` and ``--flags``; a benchmark adds its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--model", type=Path, help="target folder (default: the demo's model)")
    parser.add_argument("--drafter", help="drafter folder (default: untrained)")
    parser.add_argument("--flags", default="", help="more flags of SGLang, as one argument")
    return parser


def target(given: argparse.Namespace) -> Path:
    return given.model or demo_model(Path(os.environ.get("AURORA_HOME", "aurora-data")))


def sglang_flags(given: argparse.Namespace) -> list[str]:
    """What ``--flags`` holds."""
    return shlex.split(given.flags)


@contextmanager
def server(
    model: Path,
    drafter: str | None = None,
    *,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    database_url: str = "",
    drafts: bool = True,
) -> Iterator[tuple[ServerProcess, Path]]:
    """(a server that is ready, its data folder); both are gone afterwards. The store is a file in
    that folder unless a URL says otherwise. ``drafts``: else SGLang runs without a drafter,
    and on a GPU without us."""
    with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder:
        home = Path(folder)
        given = ["--max-total-tokens", "8192", "--max-running-requests", "8", *flags]
        texts = [prompt.prompt for prompt in sample_prompts()]
        settings = Settings(home=home, database_url=database_url)
        made = plan(str(model), drafter, given, settings, sample_texts=texts)
        started = made.flags
        if not drafts:
            on_cpu = runs_on_cpu(given)
            started = server_flags(str(model), None, "", given, on_cpu=on_cpu)
            if not on_cpu:  # there our kernels are hooks too
                environment = {"AURORA_ENABLED": "0", **(environment or {})}
        process = ServerProcess(
            started,
            port=free_port(),
            log=home / "logs" / "server.log",
            environment={
                **made.environment,
                "OMP_NUM_THREADS": "1",
                "AURORA_EXIT_WITH_PARENT": "1",
                "AURORA_DATABASE_URL": settings.store_url,
                **(environment or {}),
            },
        )
        process.start()
        try:
            process.wait_ready(_READY_SECONDS)
            yield process, home
        finally:
            process.stop()


def first_live(engine: Engine) -> tuple[int, int, int]:
    """(group, server, live version) of the one server in a store, as soon as it is there."""
    while True:
        with store.session(engine, write=False) as s:
            for group in queries.groups.groups(s):
                for row in queries.servers.servers(s, group.id):
                    if row.live_version_id:
                        return group.id, row.id, row.live_version_id
        time.sleep(0.2)


def put_live(engine: Engine, server_id: int, version_id: int, *, force: bool = False) -> None:
    """Promote a version and wait until the server reports it; ends the benchmark when it does not
    within ``PATIENCE`` seconds."""
    promote(engine, version_id, actor="benchmark", reason="benchmark", force=force)
    end = time.monotonic() + PATIENCE
    while True:
        with store.session(engine, write=False) as s:
            if queries.servers.server(s, server_id).live_version_id == version_id:
                return
        if time.monotonic() > end:
            raise SystemExit(f"version {version_id} did not go live in {PATIENCE:.0f} s")
        time.sleep(0.05)


def machine() -> str:
    """Processor and number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"


def ask(url: str, prompt: Prompt, tokens: int, **headers: str) -> dict[str, Any]:
    """One greedy answer of exactly ``tokens`` tokens from the native endpoint."""
    body = {
        "text": prompt.prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    }
    answer = httpx.post(f"{url}/generate", json=body, headers=headers, timeout=600)
    answer.raise_for_status()
    return dict(answer.json())


def report(title: str, rows: Sequence[Mapping[str, Any]], *, as_json: bool, keep: str = "") -> None:
    """One table, or the same rows as JSON; under the name ``keep`` they are also added to
    ``results/operation.jsonl``, with the machine."""
    if keep:
        key = {"benchmark": keep, "machine": machine(), "at": f"{utc_now():%Y-%m-%d %H:%M}"}
        Cells("operation").put({"rows": list(rows)}, **key)
    if as_json:
        print(json.dumps({"title": title, "rows": list(rows)}, indent=2))
        return
    print_table(title, {name: name for name in rows[0]}, rows)
