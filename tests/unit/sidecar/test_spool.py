"""The local spool: framing, torn tails, rotation, budget, cursor, locks."""

from __future__ import annotations

import os
import random
import struct
import tempfile
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.spool.cursor import Boot, Cursor
from aurora_sgl.sidecar.spool.log import DAMAGED, MAGIC, Keep, Position, Spool
from aurora_sgl.sidecar.spool.slots import adopt, open_spool
from tests.support.full_disk import Disk, full_disk  # noqa: F401 (a fixture)


def payloads(spool: Spool, position: Position) -> list[bytes]:
    found = []
    while frames := spool.read(position, max_frames=7):
        found += [frame.payload for frame in frames if frame.kind != DAMAGED]
        position = frames[-1].end
    return found


def damage(spool: Spool) -> bytes:
    """The bytes that are no frames."""
    position, found = spool.start, b""
    while frames := spool.read(position):
        found += b"".join(frame.payload for frame in frames if frame.kind == DAMAGED)
        position = frames[-1].end
    return found


def test_frames_come_back_in_order_over_many_segments(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20, segment_bytes=1 << 12)
    sent = [os.urandom(50 + i) for i in range(200)]
    assert all(spool.append(b"E", data) for data in sent)
    assert len(list(tmp_path.glob("*.spool"))) > 3
    assert payloads(spool, spool.start) == sent


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_tail_is_read_over_and_the_rest_stays(tmp_path: Path, cut: int) -> None:
    spool = Spool(tmp_path, 1 << 20)
    for i in range(5):
        spool.append(b"E", bytes([i]) * 20)
    spool.close()
    path = tmp_path / "00000001.spool"
    os.truncate(path, path.stat().st_size - cut)
    again = Spool(tmp_path, 1 << 20)
    whole = 4 if cut <= 29 else 3
    assert payloads(again, again.start) == [bytes([i]) * 20 for i in range(whole)]
    again.append(b"E", b"next")
    assert payloads(again, again.start)[-1] == b"next"
    assert len(damage(again)) == 29 * (5 - whole) - cut


def test_garbage_after_the_tail_is_read_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.append(b"E", b"one")
    spool.close()
    garbage = b"\x05\x00\x00\x00\x00\x00\x00\x00hello"
    with (tmp_path / "00000001.spool").open("ab") as file:
        file.write(garbage)
    again = Spool(tmp_path, 1 << 20)
    assert payloads(again, again.start) == [b"one"]
    assert damage(again) == garbage


@pytest.mark.parametrize("segment", [1, 3])
@pytest.mark.parametrize("where", ["length", "checksum", "kind", "payload"])
def test_one_flipped_bit_in_a_segment_old_or_newest_costs_its_frame_alone(
    tmp_path: Path, segment: int, where: str
) -> None:
    """cases.md: one flipped bit in frame 10 of 5,000 of the newest segment."""
    spool = Spool(tmp_path, 1 << 20, segment_bytes=1 << 12)
    sent = [i.to_bytes(2, "big") * 50 for i in range(100)]
    for data in sent:
        spool.append(b"E", data)
    assert spool.tail.segment == 3
    spool.close()
    path = tmp_path / f"{segment:08d}.spool"
    data = bytearray(path.read_bytes())
    offset = {"length": 0, "checksum": 5, "kind": 8, "payload": 40}[where]
    data[len(MAGIC) + 109 * 10 + offset] ^= 4
    path.write_bytes(data)
    again = Spool(tmp_path, 1 << 20, segment_bytes=1 << 12)
    hit = (segment - 1) * 37 + 10
    assert payloads(again, again.start) == sent[:hit] + sent[hit + 1 :]
    assert len(damage(again)) == 109
    assert (again.damaged, again.damaged_bytes) == (1, 109)  # once, however often it is read


def test_a_damaged_magic_line_costs_no_frame(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.append(b"E", b"one")
    spool.close()
    with (tmp_path / "00000001.spool").open("r+b") as file:
        file.write(b"B")
    again = Spool(tmp_path, 1 << 20)
    again.append(b"E", b"two")
    assert payloads(again, again.start) == [b"one", b"two"]


FRAMES = st.lists(st.binary(min_size=0, max_size=200), min_size=1, max_size=40)
#: What happens to a file: at which share of it, what, and with which bytes.
BLOWS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["flip", "cut", "insert", "overwrite", "zero"]),
        st.binary(min_size=1, max_size=300),
    ),
    min_size=1,
    max_size=6,
)


def sound_bytes(payload: bytes) -> bytes:
    data = b"E" + payload
    return struct.pack("<II", len(data), zlib.crc32(data)) + data


@settings(max_examples=100, deadline=None)
@given(frames=FRAMES, blows=BLOWS)
def test_whatever_is_flipped_cut_or_put_in_every_sound_frame_is_given_once_and_in_order(
    frames: list[bytes], blows: list[tuple[float, str, bytes]]
) -> None:
    numbered = [number.to_bytes(2, "big") + b"\xfe\xff" + one for number, one in enumerate(frames)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000001.spool"
        data = bytearray(MAGIC + b"".join(sound_bytes(payload) for payload in numbered))
        for share, what, some in blows:
            place = len(MAGIC) + int(share * max(0, len(data) - len(MAGIC) - 1))
            if what == "flip" and place < len(data):
                data[place] ^= 1 << (some[0] % 8)
            elif what == "cut":
                del data[place : place + len(some)]
            elif what == "insert":
                data[place:place] = some
            elif what == "overwrite":
                data[place : place + len(some)] = some
            elif what == "zero":
                data[place : place + len(some)] = bytes(len(some))
        path.write_bytes(data)
        left = [payload for payload in numbered if sound_bytes(payload) in data]
        again = Spool(Path(folder), 1 << 20)
        again.append(b"E", b"the next one")
        assert payloads(again, again.start) == [*left, b"the next one"]
        total = sum(len(sound_bytes(payload)) for payload in left)
        assert len(damage(again)) == len(data) - len(MAGIC) - total
        again.close()


def test_long_damage_is_given_in_pieces_and_does_not_stop_the_reader(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 26)
    spool.append(b"E", b"one")
    spool.close()
    noise = random.Random(3).randbytes(3 << 20)
    with (tmp_path / "00000001.spool").open("ab") as file:
        file.write(noise)
    again = Spool(tmp_path, 1 << 26)
    begun = time.monotonic()
    assert payloads(again, again.start) == [b"one"]
    assert damage(again) == noise
    assert time.monotonic() - begun < 10
    assert again.damaged == 1


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_disk_that_is_full_where_a_segment_ends_leaks_no_descriptor_and_goes_on_with_room(
    disk: Disk,
) -> None:
    """cases.md: disk full where a segment ends."""
    spool = Spool(disk.folder / "spool", 1 << 22, segment_bytes=1 << 12)
    size, sent = len(sound_bytes(bytes(100))), []
    while spool.tail.offset + size <= spool.segment_bytes:  # the next one wants a new segment
        sent.append(len(sent).to_bytes(100, "big"))
        assert spool.append(b"E", sent[-1])
    disk.fill()
    before, tail = descriptors(), spool.tail
    for _ in range(50):
        assert not spool.append(b"E", bytes(100))
    assert (descriptors(), spool.tail) == (before, tail)
    assert payloads(spool, spool.start) == sent
    disk.clear()
    for _ in range(60):
        sent.append(len(sent).to_bytes(100, "big"))
        assert spool.append(b"E", sent[-1])
    assert spool.tail.segment == 3
    assert payloads(spool, spool.start) == sent
    spool.close()
    again = Spool(disk.folder / "spool", 1 << 22, segment_bytes=1 << 12)
    assert payloads(again, again.start) == sent
    assert again.damaged == 0
    again.close()


def test_a_spool_that_starts_on_a_full_disk_begins_once_there_is_room(disk: Disk) -> None:
    (disk.folder / "spool").mkdir()
    (disk.folder / "spool" / "lock").touch()
    disk.fill()
    spool = Spool(disk.folder / "spool", 1 << 22)
    assert not spool.append(b"E", b"early")
    disk.clear()
    assert spool.append(b"E", b"later")
    assert payloads(spool, spool.start) == [b"later"]
    spool.close()


def test_what_the_store_has_is_kept_for_a_while_and_goes_first_when_there_is_no_room(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path, 1 << 16, keep=Keep(3600.0, 1 << 15))
    while spool.tail.segment < 4:
        spool.append(b"E", bytes(1000))
    spool.release(spool.tail)
    assert spool.start.segment == 1 and spool.kept_bytes > 20_000
    count = 0
    while spool.append(b"E", bytes(1000)):
        count += 1
    assert count > 50 and spool.kept_bytes == 0 and spool.start.segment == 4
    spool.release(spool.tail)
    assert 0 < spool.kept_bytes <= 1 << 15  # no more than that, however young
    assert spool.rewind() == spool.start and spool.kept_bytes == 0
    spool.close()


def test_a_full_spool_refuses_and_counts_until_the_store_took_something(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 16)
    taken = 0
    while spool.append(b"E", b"x" * 1000):
        taken += 1
    assert spool.size <= 1 << 16
    assert 55 <= taken <= 65
    assert not spool.append(b"E", b"x" * 1000)
    assert spool.dropped == 2
    spool.release(spool.read(spool.start, max_frames=40)[-1].end)
    assert spool.append(b"E", b"x" * 1000)


def test_a_start_goes_on_from_the_cursor(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    cursor = Cursor(spool)
    for i in range(10):
        spool.append(b"E", b"%d" % i)
    cursor.position = spool.read(cursor.position, max_frames=4)[-1].end
    cursor.boots[7] = Boot(last_seq=4)
    cursor.save()
    spool.close()
    again = Spool(tmp_path, 1 << 20)
    cursor = Cursor(again)
    assert payloads(again, cursor.position) == [b"%d" % i for i in range(4, 10)]
    assert cursor.boots[7].last_seq == 4


def test_a_broken_cursor_sends_the_whole_spool_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.append(b"E", b"one")
    (tmp_path / "cursor").write_bytes(b"")
    cursor = Cursor(spool)
    assert payloads(spool, cursor.position) == [b"one"]


def test_a_cursor_behind_a_cut_tail_goes_on_from_the_tail(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.append(b"E", b"one")
    cursor = Cursor(spool)
    cursor.position = Position(1, 10_000)
    cursor.save()
    assert Cursor(spool).position == spool.tail


def test_two_sidecars_never_share_a_spool(tmp_path: Path) -> None:
    first = Spool(tmp_path, 1 << 20)
    with pytest.raises(AuroraError, match=rf"another sidecar \(process {os.getpid()}\)"):
        Spool(tmp_path, 1 << 20)
    first.close()
    Spool(tmp_path, 1 << 20).close()


def test_a_second_sidecar_takes_its_own_slot_and_the_next_one_adopts_what_it_left(
    tmp_path: Path,
) -> None:
    first, second = (open_spool(tmp_path, None, 1 << 20) for _ in range(2))
    assert (first.folder.name, second.folder.name) == ("0", "1")
    second.append(b"E", b"left")
    left = Cursor(second)
    left.boots[9] = Boot(last_seq=3)
    left.save()
    first.close()
    second.close()
    spool = open_spool(tmp_path, None, 1 << 20)
    cursor = Cursor(spool)
    assert adopt(tmp_path, spool, cursor) == 1
    assert payloads(spool, cursor.position) == [b"left"]
    assert cursor.boots[9].last_seq == 3
    assert not (tmp_path / "spool" / "1").exists()


def test_a_spool_that_a_smaller_one_adopts_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """cases.md: a spool adopted by a smaller one."""
    first, left = (open_spool(tmp_path, None, 1 << 20) for _ in range(2))
    sent = [b"%d" % i for i in range(3000)]
    assert all(left.append(b"E", data) for data in sent)
    first.close()
    left.close()
    stored: list[bytes] = []
    for start in range(100):  # each time the sidecar is started anew, and its store takes all
        small = open_spool(tmp_path, None, 1 << 14)
        cursor = Cursor(small)
        while True:
            taken = adopt(tmp_path, small, cursor)
            frames = small.read(cursor.position)
            stored += [frame.payload for frame in frames]
            if frames:
                cursor.position = frames[-1].end
                cursor.save()
                small.release(cursor.position)
            if start % 2 or not taken:  # the even ones go on while they run
                break
        small.close()
        if not (tmp_path / "spool" / "1").exists():
            break
    assert stored == sent
    assert start < 20


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuroraError, match="can't write to"):
        Spool(tmp_path / "file" / "spool", 1 << 20)
