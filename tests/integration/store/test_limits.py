"""How much is kept belongs to the group, whatever any machine's settings say."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from aurora_sgl import limits, store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import Settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.limits import Limits
from aurora_sgl.rollout import limits as group_limits
from aurora_sgl.rollout import status
from aurora_sgl.sidecar.servers import Registry
from aurora_sgl.sidecar.spool.cursor import Cursor
from aurora_sgl.sidecar.spool.log import Spool
from aurora_sgl.sidecar.traces.budget import TraceStore
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.link import StoreLink
from tests.support import store_samples as samples
from tests.support.traces import trace_row

A, B = 901, 902  # boots of servers of two groups


def link_of(engine: Engine) -> StoreLink:
    return StoreLink(engine.url.render_as_string(hide_password=False))


def join(engine: Engine, folder: Path, group: str, boot_id: int, settings: Settings) -> int:
    """A server with these settings joins a group, as its sidecar does it; the group's id."""
    spool = Spool(folder / f"spool{boot_id}", 1 << 20)
    registry = Registry(link_of(engine), Cursor(spool), group, settings.limits)
    registry.heard(samples.hello(boot_id, f"server{boot_id}"))
    registration = registry.registration(boot_id)
    spool.close()
    assert registration is not None
    ingest(engine, registration.server_id, boot_id, [
        (1, [samples.started(number, boot_id=boot_id) for number in range(1, 6)])
    ])  # fmt: skip
    return registration.group_id


def capture(engine: Engine, root: ArtifactRoot, folder: Path, boot_id: int, numbers: range) -> None:
    """Traces of 100 bytes, as the sidecar of that server stores them."""
    file = folder / "trace"
    file.write_bytes(b"x" * 100)
    rows = []
    for number in numbers:
        request_id = wire.request_id(boot_id, number)
        rows.append(trace_row(request_id, created_us=samples.START_US + number))
        root.put_file(file, rows[-1].uri)
    TraceStore(link_of(engine), root).add(rows)


def kept(engine: Engine, group_id: int) -> int:
    with store.session(engine, write=False) as s:
        return queries.traces.trace_bytes_total(s, group_id)


@pytest.mark.parametrize("capture_bytes", [0, 1, 250])
def test_the_capture_bytes_of_one_server_delete_no_traces_of_others(
    engine: Engine, tmp_path: Path, capture_bytes: int
) -> None:
    """Whether it is in their group or in one of its own."""
    root = ArtifactRoot(str(tmp_path / "artifacts"))
    theirs = join(engine, tmp_path, "theirs", A, Settings(capture_bytes=300))
    capture(engine, root, tmp_path, A, range(1, 4))
    odd = Settings(capture_bytes=capture_bytes)
    own = join(engine, tmp_path, "own", B, odd)
    capture(engine, root, tmp_path, B, range(1, 4))
    assert (kept(engine, theirs), kept(engine, own)) == (
        300,
        {0: 300, 1: 0}.get(capture_bytes, 200),
    )
    assert join(engine, tmp_path, "theirs", 903, odd) == theirs
    capture(engine, root, tmp_path, 903, range(1, 2))
    assert kept(engine, theirs) == 300, "the oldest went for the new one, by the group's budget"
    with store.session(engine, write=False) as s:
        assert queries.limits.limits(s, theirs).trace_bytes == 300
        assert queries.traces.trace(s, wire.request_id(A, 1)) is None
    assert not root.exists(f"traces/x/{wire.request_id(A, 1)}.safetensors")
    assert root.exists(f"traces/x/{wire.request_id(A, 2)}.safetensors")


def test_a_group_keeps_what_its_first_server_said_until_somebody_changes_it(
    engine: Engine, tmp_path: Path
) -> None:
    group_id = join(engine, tmp_path, "g", A, Settings(retention_days=7, retention_versions=3))
    join(engine, tmp_path, "g", B, Settings(retention_days=1, retention_versions=0))
    done = group_limits.change(
        engine, "g", {"event_days": 14, "trace_bytes": 9}, actor="ada", reason="more disk"
    )
    assert (done.before["event_days"], done.after["event_days"]) == (7, 14)
    with store.session(engine, write=False) as s:
        assert queries.limits.limits(s, group_id) == Limits(
            trace_bytes=9, event_days=14, versions=3
        )
    audit = status.audit(engine, "g")
    assert {(row.action, row.subject, row.actor, row.reason) for row in audit} == {
        ("limit", "event_days", "ada", "more disk"), ("limit", "trace_bytes", "ada", "more disk")
    }  # fmt: skip
    shown = {row.name: row for row in group_limits.read(engine, "g")}
    assert (shown["event_days"].set_by, shown["versions"].set_by) == ("ada", "server901")


def test_a_group_of_an_older_release_has_no_budget_until_a_server_joins(engine: Engine) -> None:
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "old", "target", "", "LlamaForCausalLMEagle3")
        assert queries.limits.limits(s, group.id) == Limits(trace_bytes=None)
        assert queries.prune_runs.due_at(s, group.id) is None
        queries.limits.ensure_limits(s, group.id, Settings().limits, "test")
        assert queries.prune_runs.due_at(s, group.id) is not None


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"event_days": 0}, "event_days is 0; it can be from 1"),
        ({"event_days": 200}, "request_days (180) can't be less than event_days (200)"),
        ({"hour_days": 7}, "hour_days (7) can't be less than minute_days (30)"),
        ({"trace_bytes": -1}, "trace_bytes is -1"),
        ({"versions": 10**9}, "versions is 1,000,000,000; it can be from 0 to 36,500"),
        ({"days": 3}, "there is no limit 'days'; there is: trace_bytes"),
    ],
)
def test_limits_that_make_no_sense_are_refused(values: dict[str, int], why: str) -> None:
    with pytest.raises(AuroraError) as refusal:
        Limits().changed(values)
    assert why in str(refusal.value)


@pytest.mark.parametrize(
    ("pair", "value"),
    [("trace_bytes=20GiB", 20 << 30), ("trace_bytes=20G", 20 << 30), ("trace_bytes=5 mb", 5 << 20),
     ("trace_bytes=12", 12), ("event_days=14", 14)],
)  # fmt: skip
def test_a_limit_is_read(pair: str, value: int) -> None:
    assert limits.read([pair]) == {pair.partition("=")[0]: value}


@pytest.mark.parametrize(
    "pair",
    ["", "event_days", "event_days=", "event_days=2G", "event_days=-1", "trace_bytes=1.5G",
     "trace_bytes=G", "trace_bytes=٣", "event_days=1e3", "=3=", f"event_days={'9' * 30}"],
)  # fmt: skip
def test_what_is_no_limit_is_said_in_one_line(pair: str) -> None:
    with pytest.raises(AuroraError, match="is not NAME=NUMBER"):
        limits.read([pair])
