"""A disk without room, or with damage, beside a store that is well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.sidecar import refused
from aurora_sgl.sidecar.refused import FILE
from aurora_sgl.sidecar.spool import bypass
from tests.integration.sidecar.test_forgetful_store import drained, is_whole, send_steps
from tests.integration.sidecar.test_sift import BOOT, STEP, Inside, changed
from tests.support import store_samples as samples
from tests.support.full_disk import Disk, full_disk  # noqa: F401 (a fixture)


@pytest.fixture
def sqlite(tmp_path: Path, upgraded_sqlite: Path) -> Iterator[Engine]:
    path = tmp_path / "elsewhere.db"
    path.write_bytes(upgraded_sqlite.read_bytes())
    engine = store.connect(f"sqlite:///{path}")
    yield engine
    engine.dispose()


def test_with_a_healthy_store_a_full_disk_loses_nothing(disk: Disk, sqlite: Engine) -> None:
    inside = Inside(disk.folder / "0", sqlite, limit_bytes=1 << 26, segment_bytes=1 << 13)
    inside.send(samples.hello(), samples.started(1))
    send_steps(inside, 0, 60)
    disk.fill()
    for first in range(60, 1560, 300):
        send_steps(inside, first, 300)
        drained(inside)
    assert inside.bypass.bytes == 0 and inside.batcher.oldest_seconds == 0.0
    is_whole(inside, 1560)
    disk.fill()  # also what the segments had that are gone
    send_steps(inside, 1560, 100)
    assert inside.bypass.bytes > 0 and inside.batcher.oldest_seconds > 0.0
    disk.clear()
    send_steps(inside, 1660, 40)  # behind the others, which are on the disk now
    assert inside.bypass.bytes == 0
    drained(inside)
    is_whole(inside, 1700)
    assert inside.drops() == {}
    inside.close()
    again = Inside(disk.folder / "0", sqlite)  # whose cursor may be old
    again.seq, again.sent = inside.seq, inside.sent
    send_steps(again, 1700, 10)
    drained(again)
    is_whole(again, 1710)
    assert again.drops() == {}
    again.close()


def test_memory_beside_a_full_disk_is_bounded_and_what_it_has_no_room_for_is_counted(
    disk: Disk, sqlite: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bypass, "MEMORY_BYTES", 20_000)
    inside = Inside(disk.folder / "0", sqlite, limit_bytes=1 << 26, segment_bytes=1 << 13)
    inside.send(samples.hello(), samples.started(1))
    drained(inside)
    inside.write("ALTER TABLE request RENAME TO elsewhere")
    disk.fill()
    send_steps(inside, 0, 1000)
    lost = inside.intake.lost[BOOT]
    assert 0 < lost < 1000 and inside.bypass.bytes <= 20_000
    disk.clear()
    inside.write("ALTER TABLE elsewhere RENAME TO request")
    drained(inside)
    inside.send(samples.started(2))
    drained(inside)
    assert inside.count("acceptance_event") == 1000 - lost
    assert inside.drops() == {"spool": lost}
    inside.close()


def test_damaged_bytes_of_the_spool_are_set_aside_and_the_records_around_them_stored(
    tmp_path: Path, sqlite: Engine
) -> None:
    inside = Inside(tmp_path / "0", sqlite)
    inside.send(samples.hello(), samples.started(1))
    places = []
    for step in range(5000):
        places.append(inside.spool.tail.offset)
        inside.send(samples.chain_step(1, step, 1))
    inside.close()
    with (tmp_path / "0" / "00000001.spool").open("r+b") as file:
        file.seek(places[10] + 20)
        byte = file.read(1)[0]
        file.seek(places[10] + 20)
        file.write(bytes([byte ^ 1]))
    again = Inside(tmp_path / "0", sqlite)
    drained(again)
    assert again.count("acceptance_event") == 4999
    assert again.drops() == {"transport": 1}
    (line,) = [json.loads(one) for one in (tmp_path / "0" / FILE).read_text().splitlines()]
    assert (line["kind"], line["why"]) == ("bytes", "damaged bytes of the spool")
    assert again.spool.damaged_bytes == places[11] - places[10]
    again.close()


def test_a_file_of_refused_records_that_is_full_is_counted_and_takes_no_other_record_with_it(
    tmp_path: Path, sqlite: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refused, "LIMIT_BYTES", 900)
    inside = Inside(tmp_path / "0", sqlite)
    inside.send(samples.hello(), samples.started(1))
    for step in range(6):
        inside.send(changed(STEP, at_us=1 << 62, step=1000 + step), samples.chain_step(1, step, 1))
    drained(inside)
    assert inside.count("acceptance_event") == 6
    kept = len((tmp_path / "0" / FILE).read_text().splitlines())
    assert inside.batcher.refused.unkept == 6 - kept > 0
    inside.close()
