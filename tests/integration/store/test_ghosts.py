"""A server that nobody hears of is gone, by the store's clock, and back when it speaks again."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine, update

from aurora_sgl import store, wire
from aurora_sgl.rollout import status
from aurora_sgl.store import ghosts, ingest, queries
from aurora_sgl.store.ghosts import GhostWatch
from aurora_sgl.store.liveness import GHOST_SECONDS
from aurora_sgl.store.models import Request, Server
from aurora_sgl.store.pruning import weights
from aurora_sgl.store.store_clock import StoreNow, store_now
from tests.support import store_samples as samples

HERE, POD = 701, 702


class Listener:
    """A ghost watch on a steady clock that the test moves."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.now = engine, 1000.0
        self.watch = GhostWatch(lambda: self.now)

    def listen(self, seconds: float, step: float = 10.0) -> list[str]:
        ended = []
        for _ in range(int(seconds / step)):
            self.now += step
            ended += self.watch.tick(self.engine, 1)
        return ended


@pytest.fixture
def pods(engine: Engine) -> Iterator[tuple[Engine, int]]:
    """Two servers of other names, the second silent for as long as it takes; its id."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        queries.servers.register_server(s, group.id, samples.hello(HERE, "pod-1"))
        pod = queries.servers.register_server(s, group.id, samples.hello(POD, "pod-2")).id
        version = samples.add_version(s, group.id, "a")
        queries.servers.touch_server(s, pod, live_version_id=version)
    started = [samples.started(number, boot_id=POD) for number in (1, 2)]
    finished = samples.finished(2, [], boot_id=POD)
    ingest.ingest(engine, pod, POD, [(1, [*started, finished])])
    yield engine, pod


def silence(engine: Engine, server_id: int, seconds: float = GHOST_SECONDS + 1) -> None:
    with store.session(engine) as s:
        s.execute(
            update(Server).where(Server.id == server_id).values(last_seen_at=StoreNow(seconds))
        )


def state(engine: Engine, server_id: int) -> tuple[str, list[str]]:
    with store.session(engine, write=False) as s:
        rows = [s.get(Request, wire.request_id(POD, number)) for number in (1, 2)]
        return queries.servers.server(s, server_id).state, [row.status for row in rows if row]


def test_a_pod_that_was_replaced_under_another_name_is_gone_after_minutes(
    pods: tuple[Engine, int],
) -> None:
    engine, pod = pods
    listener = Listener(engine)
    silence(engine, pod, GHOST_SECONDS - 20)
    assert listener.listen(120) == [] and state(engine, pod)[0] == "running"
    silence(engine, pod)
    assert [one.name for one in status.servers(engine, "default") if one.silent] == ["pod-2"]
    with store.session(engine, write=False) as s:
        assert s.scalars(weights.unused(1, 0)).all() == [], "its weights are kept for it"
    assert listener.listen(60) == ["pod-2"]
    assert state(engine, pod) == ("gone", ["lost", "finished"])
    assert [one.name for one in status.servers(engine, "default")] == ["pod-1"], "its alert ends"
    with store.session(engine, write=False) as s:
        assert len(s.scalars(weights.unused(1, 0)).all()) == 1


@pytest.mark.parametrize("again", ["hello", "touch"])
def test_it_is_back_when_it_speaks_again(pods: tuple[Engine, int], again: str) -> None:
    engine, pod = pods
    silence(engine, pod)
    assert Listener(engine).listen(60) == ["pod-2"]
    with store.session(engine) as s:
        if again == "hello":  # its sidecar connects anew
            assert queries.servers.register_server(s, 1, samples.hello(POD, "pod-2")).id == pod
        else:
            assert queries.servers.come_back(s, pod)
            assert not queries.servers.come_back(s, pod)
    assert state(engine, pod) == ("running", ["running", "finished"])
    ingest.ingest(engine, pod, POD, [(2, [samples.finished(1, [], boot_id=POD)])])
    assert state(engine, pod) == ("running", ["finished", "finished"])


def test_a_silence_during_an_outage_of_the_store_is_nobodys(pods: tuple[Engine, int]) -> None:
    """All come back within seconds of each other; the first must not bury the others."""
    engine, pod = pods
    listener = Listener(engine)
    assert listener.listen(30) == []
    silence(engine, pod)  # it could not write, and neither could we look
    listener.now += 600
    assert listener.watch.tick(engine, 1) == []
    assert listener.listen(20) == []
    with store.session(engine) as s:
        queries.servers.touch_server(s, pod)
    assert listener.listen(120) == [] and state(engine, pod)[0] == "running"


def test_looks_that_lie_far_apart_say_nothing(pods: tuple[Engine, int]) -> None:
    engine, pod = pods
    silence(engine, pod)
    assert Listener(engine).listen(600, step=ghosts.DEAF_SECONDS + 1) == []


def test_who_is_there_is_told_by_the_stores_clock(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is hours off is neither a ghost nor young for ever."""
    wrong = datetime.now().astimezone() - timedelta(hours=5)
    for module in (queries.servers, ingest):
        monkeypatch.setattr(module, "utc_now", lambda: wrong)
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        server_id = queries.servers.register_server(s, group.id, samples.hello(POD)).id
    for write in ("registered", "touched", "hello"):
        if write == "touched":
            with store.session(engine) as s:
                queries.servers.touch_server(s, server_id)
        elif write == "hello":
            ingest.ingest(engine, server_id, POD, [(1, [samples.hello(POD)])])
        with store.session(engine, write=False) as s:
            age = store_now(s) - queries.servers.server(s, server_id).last_seen_at
        assert abs(age) < timedelta(seconds=60), write
    with store.session(engine) as s:
        queries.servers.touch_server(s, server_id, last_seen_at=StoreNow(90.5))
        s.expire_all()
        age = store_now(s) - queries.servers.server(s, server_id).last_seen_at
    assert timedelta(seconds=90) < age < timedelta(seconds=150)
