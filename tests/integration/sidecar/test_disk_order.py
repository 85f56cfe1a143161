"""What the cursor of a spool passed is on the disk: the calls, as the kernel sees them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from aurora_sgl import store
from aurora_sgl.store.link import StoreLink

STORES = """
import sys
from pathlib import Path
from aurora_sgl import store
from tests.integration.sidecar.test_sift import Inside
from tests.support import store_samples as samples
folder = Path(sys.argv[1])
engine = store.connect(f"sqlite:///{folder / 'aurora.db'}")
inside = Inside(folder / "0", engine, limit_bytes=1 << 22, segment_bytes=1 << 13)
inside.send(samples.hello(), samples.started(1))
assert inside.batcher.drain()
for step in range(200):
    inside.send(samples.chain_step(1, step, 1))
inside.spool.sync()
(folder / "begin").touch()
assert inside.batcher.drain()
(folder / "end").touch()
"""


@pytest.fixture
def strace() -> str:
    found = shutil.which("strace")
    if found is None or subprocess.run([found, "true"], capture_output=True).returncode:
        pytest.skip("no strace, or no right to trace")
    return found


def test_what_the_cursor_passed_is_on_the_disk(
    tmp_path: Path, strace: str, upgraded_sqlite: Path
) -> None:
    """cases.md: power cut with SQLite."""
    shutil.copy(upgraded_sqlite, tmp_path / "aurora.db")
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,rename,unlink,openat,pwrite64,write"
    subprocess.run(
        [strace, "-f", "-y", "--seccomp-bpf", "-e", calls, "-o", str(trace),
         sys.executable, "-c", STORES, str(tmp_path)],
        check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    lines = trace.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if "/begin" in line)
    end = next(number for number, line in enumerate(lines) if "/end" in line)
    batch = lines[begin:end]

    def last(pattern: str, before: int | None = None) -> int:
        return max(n for n, line in enumerate(batch[:before]) if re.search(pattern, line))

    def first(pattern: str, after: int) -> int:
        return min(n for n, line in enumerate(batch) if n > after and re.search(pattern, line))

    moved = last(r'rename\(".*/0/\.cursor\.\w+", ".*/0/cursor"')
    written = last(r"pwrite64\(\d+<.*aurora\.db-wal>", moved)
    assert written < last(r"f(data)?sync\(\d+<.*aurora\.db-wal>", moved)
    assert last(r"f(data)?sync\(\d+<.*/0/\.cursor\.", moved) < moved
    named = first(r"fsync\(\d+<.*/0>", moved)  # the folder: the new name is on the disk too
    assert named < first(r'unlink\(".*/0/\d+\.spool"', moved)  # and then segments go


def test_a_sidecars_commits_wait_for_the_disk_on_every_connection(
    tmp_path: Path, upgraded_sqlite: Path
) -> None:
    shutil.copy(upgraded_sqlite, tmp_path / "aurora.db")
    link = StoreLink(f"sqlite:///{tmp_path / 'aurora.db'}", durable=True)
    for _ in range(2):
        with link.guard() as engine, store.reading(engine) as one, store.reading(engine) as two:
            for connection in (one, two):
                assert connection.scalar(text("PRAGMA synchronous")) == 2
        engine.dispose()
    link.close()
