"""Trace files without a row are swept by who knows that no row will come."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.orphans import OTHERS_SECONDS, OWN_SECONDS, sweep_traces
from tests.support import store_samples as samples
from tests.support.traces import add_trace

OWN, OTHER, STRANGER = 601, 602, 603


@pytest.fixture
def root(engine: Engine, tmp_path: Path) -> ArtifactRoot:
    """Two boots in the store with a request that has a row, and a third boot of another store."""
    for boot_id in (OWN, OTHER):
        with store.session(engine) as s:
            group = queries.groups.ensure_group(
                s, "default", "target", "", "LlamaForCausalLMEagle3"
            )
            server_id = queries.servers.register_server(s, group.id, samples.hello(boot_id)).id
        ingest(engine, server_id, boot_id, [(1, [samples.started(1, boot_id=boot_id)])])
        with store.session(engine) as s:
            add_trace(s, wire.request_id(boot_id, 1))
    return ArtifactRoot(str(tmp_path / "artifacts"))


def put(root: ArtifactRoot, name: object, age: float) -> str:
    uri = f"traces/x/{name}.safetensors"
    path = root.local_path(uri)
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    os.utime(path, (time.time() - age, time.time() - age))
    return uri


def test_only_files_that_no_row_will_name_go(engine: Engine, root: ArtifactRoot) -> None:
    soon, late = OWN_SECONDS + 60, OTHERS_SECONDS + 60
    stay = [
        put(root, wire.request_id(OWN, 1), late),  # has a row
        put(root, wire.request_id(OTHER, 1), late),
        put(root, wire.request_id(OWN, 2), OWN_SECONDS - 60),  # its row may be on its way
        put(root, wire.request_id(OTHER, 2), soon),  # its row may wait in a spool
        put(root, wire.request_id(STRANGER, 1), late),  # of a store that shares the folder
        put(root, "9" * 40, late),
        put(root, "mine", late),
    ]
    go = [put(root, wire.request_id(OWN, 3), soon), put(root, wire.request_id(OTHER, 3), late)]
    assert sweep_traces(engine, root, [OWN, STRANGER]) == 2
    assert [root.exists(uri) for uri in stay] == [True] * len(stay)
    assert [root.exists(uri) for uri in go] == [False, False]
    assert sweep_traces(engine, root, [OWN]) == 0


def test_a_folder_that_is_not_there_has_none(engine: Engine, root: ArtifactRoot) -> None:
    assert sweep_traces(engine, root) == 0
