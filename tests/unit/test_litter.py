"""What killed processes leave half written is swept; what living ones write is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from aurora_sgl import litter
from aurora_sgl.artifacts import ArtifactRoot

DAYS_AGO = time.time() - 3 * 86_400

#: A trace that hangs at one place of its way to the artifact root, until it is killed.
WRITER = """
import sys, time
import numpy as np
from pathlib import Path
from aurora_sgl import artifacts, wire
from aurora_sgl.sidecar.traces import writer
from aurora_sgl.sidecar.traces.assembler import AssembledTrace

def hang(*_, **__):
    print("here", flush=True)
    time.sleep(600)

home, place = Path(sys.argv[1]), sys.argv[2]
if place == "scratch":
    writer.ArtifactRoot.put_file = hang
elif place == "copy":
    artifacts.os.fsync = hang
else:
    artifacts.os.replace = hang
header = wire.TraceHeader(
    5, 21474836481, 0, [1, 2], dtype="float32", aux_width=4, last_width=0, final=True,
    output_start=1, greedy=True, step_starts=[],
)
rows = np.zeros((2, 16), np.uint8)
trace = AssembledTrace(header, np.array([1, 2]), 0, rows, rows[:, :0], np.array([0]))
writer.TraceWriter(artifacts.ArtifactRoot(str(home / "artifacts")), home / "tmp").write(trace, None)
"""


def files(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def sweep(home: Path) -> int:
    return litter.sweep(home / "tmp") + ArtifactRoot(str(home / "artifacts")).sweep()


@pytest.mark.parametrize("place", ["scratch", "copy", "rename"])
def test_a_kill_while_a_trace_is_written_leaves_nothing(tmp_path: Path, place: str) -> None:
    """Twice at each of three places; before the kill nothing is taken from the living."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), place], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for one in writers:
            assert one.stdout is not None and one.stdout.readline() == "here\n"
        half_written = files(tmp_path)
        assert len(half_written) == (2 if place == "scratch" else 4)
        for name in half_written:
            os.utime(tmp_path / name, (DAYS_AGO, DAYS_AGO))  # however slowly
        assert sweep(tmp_path) == 0 and files(tmp_path) == half_written
    finally:
        for one in writers:
            one.kill()
            one.wait()
    assert sweep(tmp_path) == len(half_written)
    assert files(tmp_path) == []


OTHER = "deadbeef-1-77"


@pytest.mark.parametrize(
    ("name", "days", "goes"),
    [
        (f"7.safetensors.{OTHER}.0a1b2c3d.tmp", 0, False),  # of another machine: age tells
        (f"7.safetensors.{OTHER}.0a1b2c3d.tmp", 3, True),
        (f"{OTHER}.abcd_123.trace", 0, False),
        (f"{OTHER}.abcd_123.trace", 3, True),
        ("7.safetensors.0a1b2c3d.tmp", 0, False),  # of earlier releases
        ("7.safetensors.0a1b2c3d.tmp", 3, True),
        ("tmpab12cd34.trace", 3, True),
        (".0123456789abcdef.0a1b2c3d", 3, True),  # what was replaced
        ("7.safetensors", 3, False),
        ("notes.txt", 3, False),
        ("tmp", 3, False),
        (".hidden", 3, False),
    ],
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_age_tells_where_the_writer_can_not_be_asked(
    tmp_path: Path, name: str, days: int, goes: bool, is_folder: bool
) -> None:
    path = tmp_path / "traces" / "20261101" / name
    path.parent.mkdir(parents=True)
    inner = path / "model.safetensors" if is_folder else path
    if is_folder:
        path.mkdir()
    inner.write_bytes(b"x")
    old = time.time() - days * 86_400
    for one in {inner, path}:
        os.utime(one, (old, old))
    assert ArtifactRoot(str(tmp_path)).sweep() == goes
    assert path.exists() is not goes


def test_a_folder_whose_newest_file_is_young_stays(tmp_path: Path) -> None:
    folder = tmp_path / "versions" / f"abc.{OTHER}.0a1b2c3d.tmp"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
    os.utime(folder, (DAYS_AGO, DAYS_AGO))
    assert ArtifactRoot(str(tmp_path)).sweep() == 0 and folder.exists()


def test_what_is_not_ours_is_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "x.tmp"
    path.parent.mkdir()
    path.write_bytes(b"x")
    os.utime(path, (DAYS_AGO, DAYS_AGO))
    assert ArtifactRoot(str(tmp_path)).sweep() == 0 and path.exists()


def test_an_object_store_is_swept_too() -> None:
    root = ArtifactRoot("memory://litter-test")
    fs = fsspec.filesystem("memory")
    dead = f"{litter.mark().rpartition('-')[0]}-1"  # this process never began at tick 1
    names = [f"/litter-test/traces/a/7.safetensors.{mark}.0a1b2c3d.tmp" for mark in
             (dead, litter.mark(), OTHER)]  # fmt: skip
    for name in [*names, "/litter-test/traces/a/8.safetensors"]:
        fs.pipe_file(name, b"x")
    assert root.sweep() == 1
    assert sorted(fs.find("/litter-test")) == sorted(
        [*names[1:], "/litter-test/traces/a/8.safetensors"]
    )
    assert [uri for uri, age in root.files("traces") if age < 60 and uri.endswith("8.safetensors")]
    fs.rm("/litter-test", recursive=True)
