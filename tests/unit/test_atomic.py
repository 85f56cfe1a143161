"""A reader sees the old or the new, never half of one; a writer that fails leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aurora_sgl import atomic


def fill(new: Path, kind: str, text: str) -> None:
    if kind == "file":
        new.write_text(text)
    else:
        new.mkdir()
        for name in ("a", "b"):
            (new / name).write_text(text)


def content(place: Path) -> str:
    if place.is_dir():
        return "".join(path.read_text() for path in sorted(place.iterdir()))
    return place.read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_there_is_replaced_and_nothing_is_left_beside(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "sub" / "place"
    for text in ("x", "y"):
        with atomic.written(place) as new:
            fill(new, kind, text)
    assert content(place) == "y" * (1 if kind == "file" else 2)
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_one(
    tmp_path: Path, kind: str, error: BaseException
) -> None:
    place = tmp_path / "place"
    with atomic.written(place) as new:
        fill(new, kind, "x")
    with pytest.raises(type(error)), atomic.written(place) as new:
        fill(new, kind, "y")
        raise error
    assert set(content(place)) == {"x"} and list(tmp_path.iterdir()) == [place]


def test_a_writer_that_is_killed_leaves_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.write_text("x")
    code = (
        "import os, signal, sys; from pathlib import Path; from aurora_sgl import atomic\n"
        "with atomic.written(Path(sys.argv[1])) as new:\n"
        "    new.write_text('y'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert done.returncode == -signal.SIGKILL and place.read_text() == "x"


def test_readers_see_whole_files_while_others_write(tmp_path: Path) -> None:
    place = tmp_path / "place"
    atomic.replace_file(place, b"0" * 1000)
    over = threading.Event()

    def write(digit: bytes) -> None:
        while not over.is_set():
            atomic.replace_file(place, digit * 1000)

    writers = [threading.Thread(target=write, args=(digit,)) for digit in (b"1", b"2")]
    for writer in writers:
        writer.start()
    try:
        for _ in range(300):
            data = place.read_bytes()
            assert len(data) == 1000 and len(set(data)) == 1
    finally:
        over.set()
        for writer in writers:
            writer.join()
    assert list(tmp_path.iterdir()) == [place]


def test_a_secret_is_for_its_user_alone_from_its_first_byte(tmp_path: Path) -> None:
    place = tmp_path / "secret"
    place.write_text("old")
    place.chmod(0o644)
    atomic.replace_file(place, b"new", mode=0o600)
    assert place.read_bytes() == b"new" and os.stat(place).st_mode & 0o777 == 0o600
