"""The first command that a user types: the whole loop, on the embedded defaults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.e2e.conftest import DEMO_REQUESTS, DemoRun, until


def test_the_demo_ends_with_a_better_drafter_live(demo: DemoRun) -> None:
    summary = demo.summary
    assert summary["requests"] == DEMO_REQUESTS
    assert summary["failed_requests"] == 0
    assert summary["dropped_records"] == 0
    assert summary["events"] > DEMO_REQUESTS
    assert len(summary["versions"]) >= 2
    assert all(version["accept_length"] >= 1.0 for version in summary["versions"])
    assert summary["live_version"] in [version["id"] for version in summary["versions"]]
    live = next(v for v in summary["versions"] if v["id"] == summary["live_version"])
    assert live["id"] > 1 and live["weights_sha256"] == summary["live_sha256"]
    length = summary["accept_length"]
    assert length["last"] >= 1.10
    assert length["ci_low"] > 0  # the paired 95% interval of the difference excludes 0
    speeds = {"no_speculation", "first", "no_speculation_last", "last"}
    assert set(summary["tokens_per_second"]) == speeds
    assert all(speed > 0 for speed in summary["tokens_per_second"].values())


def test_the_demo_says_what_it_does_while_it_does_it(demo: DemoRun) -> None:
    for words in (
        "SGLang is ready",
        "held-out prompts, first",
        "promoted",
        f"requests: {DEMO_REQUESTS}/{DEMO_REQUESTS}",
    ):
        assert words in demo.errors
    assert "Traceback" not in demo.errors


@contextmanager
def started(home: Path, base_home: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A demo whose SGLang is ready, and the file of what it says; nothing of it is left behind."""
    home.mkdir()
    (home / "models").symlink_to(base_home / "models")
    said = home / "demo.err"
    demo = subprocess.Popen(
        [sys.executable, "-m", "aurora_sgl.cli", "demo", "--held-out", "2"],
        stdout=subprocess.DEVNULL,
        stderr=said.open("wb"),
        env={**os.environ, "AURORA_HOME": str(home)},
    )
    try:
        until(lambda: "SGLang is ready" in said.read_text(), 400, "the server")
        yield demo, said
    finally:  # a failure must not leave a server to the tests that follow
        with suppress(psutil.NoSuchProcess):
            left = psutil.Process(demo.pid)
            for process in [*left.children(recursive=True), left]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        demo.wait(30)


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path, base_home: Path, model: Path) -> None:
    with started(tmp_path / "home", base_home) as (demo, said):
        until(lambda: "dashboard: http://127.0.0.1:" in said.read_text(), 1000, "its page")
        time.sleep(2)
        family = psutil.Process(demo.pid).children(recursive=True)
        assert len(family) >= 4  # the server, its scheduler, its sidecar, the dashboard, ...
        pages = [process for process in family if "dashboard" in process.cmdline()]
        assert [process.nice() for process in pages] == [15]  # it never stands in the server's way
        demo.send_signal(signal.SIGINT)
        assert demo.wait(90) in (0, 130)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, [process.cmdline() for process in alive]
        assert "Traceback" not in said.read_text()


def test_a_demo_whose_server_ends_says_so_and_ends(
    tmp_path: Path, base_home: Path, model: Path
) -> None:
    with started(tmp_path / "home", base_home) as (demo, said):
        family = psutil.Process(demo.pid).children(recursive=True)
        schedulers = [p for p in family if "sglang::scheduler" in " ".join(p.cmdline())]
        assert schedulers, [process.cmdline() for process in family]
        for process in schedulers:
            process.kill()
        assert demo.wait(90) == 1
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, [process.cmdline() for process in alive]
        last = said.read_text().strip().splitlines()[-1]
        assert last.startswith("aurora-sgl: SGLang ended by itself: ") and "server.log)" in last
        assert said.read_text().count("a request failed") <= 2  # those that were on their way
        assert "Traceback" not in said.read_text()
