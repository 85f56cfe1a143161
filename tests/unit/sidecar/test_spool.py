"""The local spool: framing, torn tails, rotation, budget, cursor, locks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.spool.cursor import Boot, Cursor
from aurora_sgl.sidecar.spool.log import MAGIC, Position, Spool
from aurora_sgl.sidecar.spool.slots import adopt, open_spool


def payloads(spool: Spool, position: Position) -> list[bytes]:
    found = []
    while frames := spool.read(position, max_frames=7):
        found += [frame.payload for frame in frames]
        position = frames[-1].end
    return found


def test_frames_come_back_in_order_over_many_segments(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20, segment_bytes=1 << 12)
    sent = [os.urandom(50 + i) for i in range(200)]
    assert all(spool.append(b"E", data) for data in sent)
    assert len(list(tmp_path.glob("*.spool"))) > 3
    assert payloads(spool, spool.start) == sent


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_tail_is_cut_off_and_the_rest_stays(tmp_path: Path, cut: int) -> None:
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


def test_garbage_after_the_tail_is_cut_off(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.append(b"E", b"one")
    spool.close()
    with (tmp_path / "00000001.spool").open("ab") as file:
        file.write(b"\x05\x00\x00\x00\x00\x00\x00\x00hello")
    again = Spool(tmp_path, 1 << 20)
    assert payloads(again, again.start) == [b"one"]


def test_damage_in_an_old_segment_costs_only_the_rest_of_that_segment(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20, segment_bytes=1 << 12)
    sent = [i.to_bytes(2, "big") * 50 for i in range(120)]
    for data in sent:
        spool.append(b"E", data)
    with (tmp_path / "00000001.spool").open("r+b") as file:
        file.seek(len(MAGIC) + 109 * 3 + 20)
        file.write(b"\xff\xff")
    found = payloads(spool, spool.start)
    assert found[:3] == sent[:3]
    assert found[3:] == sent[len(sent) - len(found) + 3 :]
    assert spool.damaged == 1


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


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuroraError, match="can't write to"):
        Spool(tmp_path / "file" / "spool", 1 << 20)
