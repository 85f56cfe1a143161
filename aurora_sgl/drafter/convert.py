"""Pickled weights to safetensors, in a process of its own that runs nothing that stands in them.

Reading a pickle means to run it. PyTorch's reader for weights alone runs only what builds tensors;
should that fail to hold, or the file be made to eat memory, time or disk, it happens in a process
without our settings that sets itself limits and writes one file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from aurora_sgl import atomic
from aurora_sgl.drafter import weights
from aurora_sgl.errors import AuroraError

SECONDS = 600
#: What a Python needs to find itself and its packages.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG")


def convert(folder: Path, into: Path, *, force: bool = False, seconds: int = SECONDS) -> Path:
    """A copy of a drafter folder with ``model.safetensors`` in place of its pickle.

    Raises ``AuroraError`` when there is no pickle in it, when the pickle holds more than named
    tensors or passes the limits, and when ``into`` has something in it (``force`` replaces it).
    """
    folder, into = Path(folder), Path(into)
    files = _pickles(folder)
    if into.exists() and (not into.is_dir() or any(into.iterdir())) and not force:
        raise AuroraError(f"{into} is not empty; choose another folder or add --force")
    with atomic.written(into) as new:
        new.mkdir()
        for path in folder.glob("*.json"):
            if path.is_file() and not path.name.endswith(weights.INDEX):
                shutil.copyfile(path, new / path.name)
        _run(files, new / weights.WEIGHTS, seconds)
        (new / weights.WEIGHTS).chmod(0o644)
    return into


def _pickles(folder: Path) -> list[Path]:
    if not (folder / "config.json").exists():
        raise AuroraError(f"no config.json in {folder}: not a drafter folder")
    one = folder / weights.PICKLE
    files = [one] if one.exists() else weights.shards(folder, weights.PICKLE)
    if not files:
        raise AuroraError(f"no {weights.PICKLE} in {folder}: there is nothing to convert")
    for path in files:
        if not path.is_file():
            raise AuroraError(f"{path} is missing: the index beside it names it")
    return files


def _run(files: list[Path], out: Path, seconds: int) -> None:
    child = [sys.executable, "-P", "-m", "aurora_sgl.drafter.unpickle", str(out.absolute())]
    with tempfile.TemporaryDirectory(prefix="aurora-sgl-convert-") as scratch:
        try:
            done = subprocess.run(
                [*child, str(seconds), *(str(path.absolute()) for path in files)],
                cwd=scratch,
                env=environment(scratch),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise AuroraError(f"{files[0]} was not read in {seconds} s; nothing is kept") from None
    if done.returncode or not out.is_file():
        raise AuroraError(f"{files[0]} can't be converted: {_why(done)}")


def environment(scratch: str) -> dict[str, str]:
    """Of the process: nothing of ours, and no home to look into."""
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
    own = {"HOME": scratch, "TMPDIR": scratch, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | own


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it went past its limits of memory, time or disk (signal {-done.returncode})"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in (lines or ["it ended early"])[-1])[:300]
