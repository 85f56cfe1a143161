"""Hidden states from the engine's capture, through the ring, into files of a real sidecar."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.torch import load_file

from aurora_sgl import wire
from aurora_sgl.engine import copier
from aurora_sgl.engine.channel import Channel
from tests.support import store_samples as samples
from tests.support.capture_parts import MIB, House
from tests.support.sidecar_engine import Engine, Sidecar, wait_until

pytestmark = pytest.mark.process

BOOT = 7  # the house's


@pytest.fixture
def endpoint(tmp_path: Path) -> Path:
    return tmp_path / "e"


@pytest.fixture
def sidecar(home: Path, endpoint: Path) -> Iterator[Sidecar]:
    one = Sidecar(home, endpoint)
    one.wait_ready()
    yield one
    one.kill()


@pytest.fixture
def house(sidecar: Sidecar, endpoint: Path) -> Iterator[House]:
    """Records go by the sockets of an engine like the plugin's, traces by the plugin's own."""
    engine = Engine(endpoint, BOOT)
    engine.run()
    one = House(send=Channel(endpoint, BOOT, 100).send_traces)
    one.started = lambda number: engine.send(samples.started(number, boot_id=BOOT))
    yield one
    one.close()
    engine.close()


def rows(sidecar: Sidecar) -> list[tuple[int, str, int, int]]:
    file = sidecar.home / "aurora.db"
    if not file.exists():
        return []
    with closing(sqlite3.connect(file)) as connection:
        try:
            query = 'SELECT request_id, uri, start, "end" FROM trace ORDER BY request_id'
            return connection.execute(query).fetchall()
        except sqlite3.OperationalError:
            return []


def serve(house: House, prompt: int, steps: int) -> None:
    req, state = house.begin(prompt)
    house.prefill(req, state, 0, prompt)
    for _ in range(steps):
        house.step([(req, state)], [3])
    house.finish(req, state)


def test_traces_go_through_the_ring_into_files(house: House, sidecar: Sidecar) -> None:
    long = 3 * MIB // (4 * 8 * 4)
    for prompt in (20, long, 5):
        serve(house, prompt, 4)
    taken = wait_until(lambda: len(some := rows(sidecar)) == 3 and some)
    assert [row[2:] for row in taken] == [(0, 32), (0, long + 12), (0, 17)]
    for _, uri, _, end in taken:
        tensors = load_file(sidecar.home / "artifacts" / uri)
        assert tensors["aux"][:, 0].tolist() == [float(n) for n in range(end)]
        assert tensors["last"][:, 7].tolist() == [-float(n) for n in range(end)]
        assert tensors["step_starts"].tolist() == [end - 12, end - 9, end - 6, end - 3]
    wait_until(lambda: house.capture.counters()["trace_bytes_reserved"] == 0)
    assert house.capture.counters()["dropped_traces"] == 0


def test_a_killed_sidecar_costs_the_traces_under_way_and_leaves_nothing(
    house: House, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "PATIENCE", 1.0)
    before = set(os.listdir("/dev/shm"))
    req, state = house.begin(500)
    house.prefill(req, state, 0, 500)
    wait_until(lambda: house.copier._ring is not None and house.copier.freed > 0)
    sidecar.kill()
    house.step([(req, state)], [3])
    house.finish(req, state)
    wait_until(lambda: house.copier.is_behind() and not house.copier.held)
    assert house.capture.choose(10, 10) == 0
    sidecar.start()
    sidecar.wait_ready()
    wait_until(lambda: not house.copier.is_behind())
    serve(house, 30, 2)
    wait_until(lambda: [row[3] for row in rows(sidecar)] == [36])
    wait_until(lambda: house.capture.counters()["trace_bytes_reserved"] == 0)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "aurora" in name} == set()
    assert wire.request_id(BOOT, 1) not in [row[0] for row in rows(sidecar)]
