"""Frames of a spool that are put in the place of others, under a reader and a writer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aurora_sgl.sidecar.spool.bypass import Bypass
from aurora_sgl.sidecar.spool.cursor import Cursor
from aurora_sgl.sidecar.spool.log import MAGIC, Keep, Spool
from aurora_sgl.sidecar.spool.rewrite import FILLER, rewrite


def frames(spool: Spool) -> list[tuple[bytes, bytes]]:
    position, found = spool.start, []
    while some := spool.read(position, max_frames=5):
        found += [(frame.kind, frame.payload) for frame in some]
        position = some[-1].end
    return found


def without_secret(data: bytes) -> bytes | None:
    """A shorter frame for some, none at all for others."""
    if b"secret" not in data:
        return None
    return b"E" + data[1:10] if data[1] % 2 else b""


@pytest.mark.parametrize("seed", range(8))
def test_places_stay_and_only_what_was_asked_for_goes(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    spool = Spool(tmp_path, 1 << 20, segment_bytes=1 << 12)
    sent = []
    for i in range(120):
        body = bytes([i]) + rng.randbytes(rng.randrange(20, 90))
        sent.append(body + (b"secret" if rng.random() < 0.3 else b""))
        assert spool.append(b"E", sent[-1])
    ends = [frame.end for frame in spool.read(spool.start)]
    cursor = Cursor(spool)
    cursor.position = ends[rng.randrange(len(ends))]
    tail, size = spool.tail, spool.size
    waiting = [frame.payload for frame in spool.read(cursor.position)]
    changed = sum(b"secret" in one for one in sent)
    assert rewrite(spool, without_secret) == changed
    assert (spool.tail, spool.size) == (tail, size)
    kept = [one for one in sent if b"secret" not in one]
    bodies = [payload for kind, payload in frames(spool) if kind != FILLER]
    assert [one for one in bodies if len(one) > 9] == kept
    assert all(b"secret" not in path.read_bytes() for path in tmp_path.glob("*"))
    after = [f.payload for f in spool.read(cursor.position) if f.kind != FILLER]
    assert [one for one in after if len(one) > 9] == [one for one in waiting if one in kept]
    assert spool.append(b"E", b"more") and frames(spool)[-1] == (b"E", b"more")
    assert rewrite(spool, without_secret) == 0  # again changes nothing
    spool.close()
    again = Spool(tmp_path, 1 << 20)
    assert frames(again)[-1] == (b"E", b"more") and again.damaged == 0
    again.close()


def test_what_comes_while_a_segment_is_written_anew_is_in_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    for i in range(10):
        spool.append(b"E", bytes([i]) * 20 + b"secret")
    late = iter(range(100, 110))

    def change(data: bytes) -> bytes | None:
        spool.append(b"E", b"late %d" % next(late))  # as the receiving thread would
        return b""

    assert rewrite(spool, change) == 10
    bodies = [payload for kind, payload in frames(spool) if kind != FILLER]
    assert bodies == [b"late %d" % i for i in range(100, 110)]
    spool.append(b"E", b"last")
    spool.close()
    again = Spool(tmp_path, 1 << 20)
    assert [p for k, p in frames(again) if k != FILLER] == [*bodies, b"last"]
    again.close()


def test_a_segment_that_the_store_has_taken_meanwhile_does_not_come_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20, segment_bytes=1 << 12)
    for i in range(100):
        spool.append(b"E", bytes([i]) * 80 + b"secret")

    def change(data: bytes) -> bytes | None:
        spool.release(spool.tail)
        return b""

    rewrite(spool, change)
    assert sorted(tmp_path.glob("*.spool")) == [tmp_path / f"{spool.tail.segment:08d}.spool"]
    assert [path.name for path in tmp_path.glob("*.new")] == []
    spool.close()


def test_damage_that_nobody_can_read_is_overwritten(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20, segment_bytes=1 << 12)
    for i in range(100):
        spool.append(b"E", bytes([i]) * 80 + b"secret")
    path = tmp_path / "00000001.spool"
    data = bytearray(path.read_bytes())
    data[len(MAGIC) + 8 + 3] ^= 1  # inside of the first frame
    path.write_bytes(data)
    rewrite(spool, without_secret)
    assert b"secret" not in path.read_bytes() and path.stat().st_size == len(data)
    assert spool.damaged == 0
    assert [kind for kind, _ in frames(spool)].count(b"D") == 0 and spool.damaged == 0
    left = [payload for kind, payload in frames(spool) if kind == b"E"]
    assert [one[0] for one in left] == [i for i in range(1, 100) if i % 2]
    spool.close()


def test_what_the_store_has_and_the_spool_keeps_is_rewritten_too(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20, segment_bytes=1 << 12, keep=Keep(3600.0, 1 << 20))
    for i in range(100):
        spool.append(b"E", bytes([i]) * 80 + b"secret")
    spool.release(spool.tail)
    assert spool.kept_bytes > 0 and rewrite(spool, without_secret) == 100
    assert spool.kept_bytes > 0 and spool.rewind() == spool.start
    assert all(b"secret" not in path.read_bytes() for path in tmp_path.glob("*.spool"))
    assert all(b"secret" not in payload for _, payload in frames(spool))
    spool.close()


def test_what_waits_in_memory_past_a_full_spool_is_rewritten_in_its_place(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 13)
    bypass = Bypass(spool)
    bodies = [bytes([i]) * 40 + (b"secret" if i % 3 else b"") for i in range(200)]
    put = [body for body in bodies if bypass.put(b"E", body)]
    waiting = len(bypass)
    assert 10 < waiting < len(put)
    bypass.rewrite(lambda data: None)
    assert len(bypass) == waiting
    changed = bypass.rewrite(without_secret)
    assert changed == sum(b"secret" in body for body in put[-waiting:])
    left = bypass.take(spool.tail, 1000)
    bypass.done(0)
    assert [f.payload for f in left if len(f.payload) > 9] == [
        body for body in put[-waiting:] if b"secret" not in body
    ]
    assert bypass.bytes == sum(len(frame.payload) for frame in left)
    spool.close()
