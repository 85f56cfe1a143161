"""Runs all of tests/gpu and the speed of training on this machine's GPU; writes a Markdown report.

    python tools/gpu_report.py [--out benchmarks/results/gpu-report.md] [--commit ID]

Needs PyTorch with CUDA, flashinfer-python and what tests/gpu imports. With SGLang real servers are
tested too (tests/gpu/test_server_gpu.py says what it reads from the environment); without it those
tests are skipped. The report names the commit, the device and the versions, and every test that
failed or was skipped with its reason. Exit status 1 when a test failed, when none ran, or when
there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("torch", "flashinfer-python", "sglang", "sglang-kernel", "transformers"),
    *("triton", "safetensors"),
)


@dataclass(frozen=True)
class Outcome:
    file: str
    test: str
    state: str  # passed, failed or skipped
    seconds: float
    why: str = ""


def run_tests(folder: Path, junit: Path) -> list[Outcome]:
    """Runs pytest on a folder, without the fixtures above it (they need a database). What it says
    is printed as it says it."""
    command = [sys.executable, "-m", "pytest", "-q", str(folder), f"--confcutdir={folder}"]
    command += [f"--junitxml={junit}", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    subprocess.run(command, cwd=ROOT, check=False)
    return outcomes(junit) if junit.exists() else []


def outcomes(junit: Path) -> list[Outcome]:
    """The tests of a JUnit file, one line of reason each."""
    found = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        state, why = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                state = "skipped" if child.tag == "skipped" else "failed"
                why = " ".join((child.get("message") or child.tag).split())[:200]
        file = (case.get("classname") or "").rpartition(".")[2] or "collection"
        found.append(
            Outcome(file, case.get("name") or "", state, float(case.get("time") or 0), why)
        )
    return found


def facts(commit: str | None) -> dict[str, str]:
    """What ran where."""
    import torch

    found = {
        "commit": commit or _commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "device": "none",
        "Python": platform.python_version(),
        "CUDA of PyTorch": str(torch.version.cuda),
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        found["device"] = f"{torch.cuda.get_device_name(0)}, compute capability {major}.{minor}"
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def speed(rounds: int) -> dict[str, Any] | str:
    """What benchmarks/training_speed.py prints, or the last line it failed with."""
    command = [sys.executable, str(ROOT / "benchmarks" / "training_speed.py")]
    command += ["--device", "cuda", "--rounds", str(rounds), "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        return (ended.stderr.strip().splitlines() or ["no output"])[-1]
    return dict(json.loads(ended.stdout))


def markdown(
    what: dict[str, str], tests: Sequence[Outcome], measured: dict[str, Any] | str | None
) -> str:
    """The report."""
    counts = Counter(test.state for test in tests)
    lines = ["# GPU report", "", *(f"- {name}: {value}" for name, value in what.items()), ""]
    lines += [
        f"tests/gpu: **{counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['skipped']} skipped**",
        "",
        "| file | passed | failed | skipped | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file in sorted({test.file for test in tests}):
        mine = [test for test in tests if test.file == file]
        states = Counter(test.state for test in mine)
        took = sum(test.seconds for test in mine)
        lines.append(
            f"| {file} | {states['passed']} | {states['failed']} | {states['skipped']} "
            f"| {took:.1f} |"
        )
    for state in ("failed", "skipped"):
        some = [test for test in tests if test.state == state]
        if some:
            lines += ["", f"## {state.capitalize()}", ""]
            lines += [f"- {test.file}: {test.test}: {test.why}" for test in some]
    if measured is not None:
        lines += ["", "## Speed of training", "", *_speed_lines(measured)]
    return "\n".join(lines) + "\n"


def _speed_lines(measured: dict[str, Any] | str) -> list[str]:
    if isinstance(measured, str):
        return [f"It failed: {measured}"]
    lines = [
        "From `benchmarks/training_speed.py`; the ratio is to the first row of its group.",
        "",
        "| what | target | rows | drafted | attention | dtype | tokens/s | ms | ratio | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = ("what", "size", "length", "own", "attention", "dtype")
    numbers = ("tokens_per_second", "milliseconds", "ratio", "peak_mib")
    for row in measured["rows"]:
        cells = [str(row[name] or "") for name in names]
        if "failed" in row:
            cells += [f"failed: {row['failed'][:120]}", "", "", ""]
        else:
            cells += [f"{row[name]:.2f}" if name in row else "" for name in numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _commit() -> str:
    found = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{found} with changes" if changed else found or "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu-report.md")
    parser.add_argument("--commit", help="where there is no git; default: the checkout's")
    parser.add_argument("--rounds", type=int, default=3, help="of the benchmark; 0: leave it out")
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu_report: PyTorch sees no CUDA device here; nothing was run", file=sys.stderr)
        return 1
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        tests = run_tests(ROOT / "tests" / "gpu", Path(folder) / "junit.xml")
    measured = speed(given.rounds) if given.rounds else None
    given.out.parent.mkdir(parents=True, exist_ok=True)
    beside = given.out.with_suffix(".tmp")
    beside.write_text(markdown(facts(given.commit), tests, measured))
    beside.replace(given.out)
    print(f"written: {given.out}")
    ran = Counter(test.state for test in tests)
    return 1 if ran["failed"] or not ran["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
