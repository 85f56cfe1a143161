"""The shared memory between engine and sidecar: what is written is read, and nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aurora_sgl.trace_ring import RingReader, RingWriter

SIZE = 1 << 20


@pytest.fixture
def ends() -> Iterator[tuple[RingWriter, RingReader]]:
    writer = RingWriter(SIZE)
    reader = RingReader(writer.path)
    yield writer, reader
    reader.close()
    writer.close()


def write(writer: RingWriter, data: bytes) -> int | None:
    position = writer.allocate(len(data))
    if position is not None:
        writer.rows(position, 1, len(data))[0] = np.frombuffer(data, np.uint8)
    return position


def test_what_is_written_is_read_however_often_the_ring_turns(
    ends: tuple[RingWriter, RingReader],
) -> None:
    writer, reader = ends
    draw = np.random.default_rng(1)
    waiting: list[tuple[int, bytes]] = []
    turned = 0
    while turned < 500:
        data = draw.bytes(int(draw.integers(1, writer.largest)))
        position = write(writer, data)
        if position is not None:
            waiting.append((position, data))
        if position is None or draw.random() < 0.3:
            place, wanted = waiting.pop(0)
            assert reader.read(place, len(wanted)) == wanted
            reader.free(place + len(wanted))
            turned += 1
    assert writer.head > 50 * SIZE


def test_an_empty_ring_takes_the_largest_piece_wherever_its_head_is(
    ends: tuple[RingWriter, RingReader],
) -> None:
    writer, reader = ends
    for step in range(1, 400, 7):
        assert writer.allocate(step * 600) is not None
        reader.free(writer.head)
        assert writer.allocate(writer.largest) is not None
        reader.free(writer.head)


def test_a_full_ring_takes_nothing_and_what_was_given_back_is_free(
    ends: tuple[RingWriter, RingReader],
) -> None:
    writer, _ = ends
    positions = [writer.allocate(SIZE // 4) for _ in range(4)]
    assert None not in positions and writer.allocate(1) is None
    assert positions[3] is not None
    writer.give_back(positions[3])
    assert writer.allocate(SIZE // 4) == positions[3]


def test_a_reader_that_says_nonsense_frees_no_more_than_there_is(
    ends: tuple[RingWriter, RingReader],
) -> None:
    writer, reader = ends
    writer.allocate(100)
    reader.free(1 << 60)
    assert writer.freed == 100
    reader.free(-5)
    assert writer.freed == 0


@pytest.mark.parametrize(("position", "count"), [(0, SIZE + 1), (-1, 4), (SIZE - 2, 4), (0, -1)])
def test_a_place_that_is_not_in_the_ring_is_refused(
    ends: tuple[RingWriter, RingReader], position: int, count: int
) -> None:
    with pytest.raises(ValueError, match="not in a ring"):
        ends[1].read(position, count)


@pytest.mark.parametrize("path", ["/etc/passwd", "", "/proc/1/fd/../../../etc/passwd"])
def test_a_path_that_is_no_ring_is_not_opened(path: str) -> None:
    with pytest.raises(ValueError, match="not a ring"):
        RingReader(path)


def test_nobody_can_make_it_smaller_and_it_has_no_name(
    ends: tuple[RingWriter, RingReader],
) -> None:
    writer, _ = ends
    fd = os.open(writer.path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 10)
    os.close(fd)
    assert not any("aurora-traces" in path.name for path in Path("/dev/shm").iterdir())


@pytest.mark.process
def test_when_a_killed_engine_is_gone_its_memory_is_the_readers_alone() -> None:
    code = (
        "import sys, time; from aurora_sgl.trace_ring import RingWriter; w = RingWriter(1 << 20);"
        "p = w.allocate(4); w.rows(p, 1, 4)[0] = 7; print(w.path, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        reader = RingReader(path)
        process.kill()
        process.wait()
    assert not Path(path).exists()
    assert reader.read(0, 4) == b"\7\7\7\7"
    reader.close()
