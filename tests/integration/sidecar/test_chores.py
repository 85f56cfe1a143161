"""What a sidecar tidies of its own machine."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine

from aurora_sgl import litter, store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.limits import Limits
from aurora_sgl.sidecar import refused
from aurora_sgl.sidecar.chores import Chores
from aurora_sgl.sidecar.refused import RefusedFile, RefusedRecord
from aurora_sgl.store import queries
from tests.integration.store.test_limits import link_of
from tests.support import store_samples as samples

BOOT = 501


def record(seq: int) -> RefusedRecord:
    return RefusedRecord(BOOT, seq, samples.started(seq, boot_id=BOOT), "a test")


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_litter_orphans_and_old_refused_records_go(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        queries.servers.register_server(s, group.id, samples.hello(BOOT))
        queries.limits.ensure_limits(s, group.id, Limits(refused_days=10), "test")
    scratch, traces = tmp_path / "tmp", tmp_path / "artifacts" / "traces"
    dead = f"{litter.mark().rpartition('-')[0]}-1.abcdefgh.trace"
    for path in (scratch / dead, traces / f"{wire.request_id(BOOT, 7)}.safetensors"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 1000)
        os.utime(path, (time.time() - 4000, time.time() - 4000))
    file = RefusedFile(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(refused, "utc_now", lambda: utc_now() - timedelta(days=11))
        file.keep([record(1), record(2)])
    file.keep([record(3)])
    group_ids = iter([None, group.id, group.id])
    chores = Chores(
        link_of(engine), ArtifactRoot(str(tmp_path / "artifacts")), scratch, file,
        stored_boots=lambda: [BOOT], group_id=lambda: next(group_ids),
    )  # fmt: skip
    chores.do()  # nobody has said yet whose limits count
    assert [one.seq for one in refused.read(file.path)] == [1, 2, 3]
    assert list(scratch.iterdir()) == [] and list(traces.iterdir()) == []
    chores.do()
    assert [one.seq for one in refused.read(file.path)] == [3]
    assert file.path.stat().st_mode & 0o777 == 0o600
    chores.do()
    assert [one.seq for one in refused.read(file.path)] == [3]


def test_refused_records_that_come_while_old_ones_go_are_kept(tmp_path: Path) -> None:
    file = RefusedFile(tmp_path)
    stop = threading.Event()

    def trim() -> None:
        while not stop.is_set():
            file.forget_before(utc_now() - timedelta(days=1))

    old = b'{"at":"2020-01-01T00:00:00+00:00","why":"","boot_id":1,"seq":1,"kind":"x","data":""}\n'
    thread = threading.Thread(target=trim)
    thread.start()
    for seq in range(1, 61):
        with file._lock, file.path.open("ab") as out:
            out.write(old)
        file.keep([record(seq)])
    stop.set()
    thread.join()
    with file.path.open("ab") as out:
        out.write(b'{"at": "torn')
    assert file.forget_before(utc_now() - timedelta(days=1)) in (0, 1)
    assert [one.seq for one in refused.read(file.path)] == list(range(1, 61))
    assert file.path.read_bytes().endswith(b"torn"), "nobody can tell how old that is"
