"""Conversations that no client names, in the store that all servers share; both databases."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import Engine

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.sequences.splits import conversation_of, split_key
from aurora_sgl.sidecar.traces.budget import TraceStore
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.purge import Selector, begin_purge
from aurora_sgl.store.purge_rows import purge_chunk
from tests.support import store_samples as samples
from tests.support.traces import trace_row

ONE, TWO = 801, 802  # boots


class Fleet:
    """Servers that share a store, and a client that sends whole chats."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder, self.numbers = engine, folder, 0
        self.servers: dict[int, int] = {}
        self.stores: dict[int, TraceStore] = {}
        for boot in (ONE, TWO):
            with store.session(engine) as s:
                group = queries.groups.ensure_group(s, "default", "t", "", "LlamaForCausalLMEagle3")
                server = queries.servers.register_server(
                    s, group.id, samples.hello(boot, str(boot))
                )
                self.servers[boot] = server.id
            self.start(boot)

    def start(self, boot: int) -> None:
        """The sidecar of a server, or one that takes its place."""
        link = StoreLink(self.engine.url.render_as_string(hide_password=False))
        self.stores[boot] = TraceStore(link, ArtifactRoot(str(self.folder)))

    def turn(self, boot: int, prompt: list[int], answer: list[int], name: str = "") -> int:
        self.numbers += 1
        hash_ = sha256_ints(list(name.encode())) if name else sha256_ints(prompt)
        started = msgspec.structs.replace(
            samples.started(self.numbers, boot_id=boot, at_us=wire.now_us() - 60_000_000),
            conversation_hash=hash_,
        )
        records: list[wire.Record] = [started, samples.finished(self.numbers, [], boot_id=boot)]
        ingest(self.engine, self.servers[boot], boot, [(self.numbers, records)])
        row = trace_row(
            started.request_id, created_us=wire.now_us(), output_start=len(prompt),
            prompt_sha256=sha256_ints(prompt), end=len(prompt) + len(answer) - 1,
            tokens=np.array([*prompt, *answer], np.int32).tobytes(),
        )  # fmt: skip
        self.stores[boot].add([row])
        ingest(self.engine, self.servers[boot], boot, [(self.numbers, records)])  # once more
        return started.request_id

    def rows(self, *ids: int) -> list[queries.requests.RecentRequest]:
        with store.session(self.engine, write=False) as s:
            by_id = {r.request_id: r for r in queries.requests.recent_requests(s, 1)}
        return [by_id[each] for each in ids]


@pytest.fixture
def fleet(engine: Engine, tmp_path: Path) -> Fleet:
    return Fleet(engine, tmp_path)


FIRST, ANSWER = [1, 2, 3, 4], [5, 6, 7, 8]
SECOND = [*FIRST, *ANSWER, 9, 10]
THIRD = [*SECOND, 11, 12, 13]


def test_a_chat_over_two_servers_and_a_restart_is_one_conversation(fleet: Fleet) -> None:
    first = fleet.turn(ONE, FIRST, ANSWER)
    second = fleet.turn(TWO, SECOND, [11, 12])
    fleet.start(ONE)
    third = fleet.turn(ONE, THIRD, [14, 15, 16])
    other = fleet.turn(TWO, [1, 2, 30, 4], ANSWER)
    rows = fleet.rows(first, second, third)
    assert len({conversation_of(row) for row in rows}) == 1
    assert {split_key(row) for row in rows} == {rows[0].prompt_sha256}, "the first turn's side"
    (alone,) = fleet.rows(other)
    assert split_key(alone) == alone.prompt_sha256 != split_key(rows[0])


def test_the_name_that_a_client_gives_counts(fleet: Fleet) -> None:
    named = fleet.turn(ONE, FIRST, ANSWER, name="mine")
    after = fleet.turn(ONE, SECOND, [11, 12])
    rows = fleet.rows(named, after)
    assert ":" not in rows[0].conversation_hash and ":" in rows[1].conversation_hash
    assert split_key(rows[0]) != split_key(rows[1]) == rows[1].prompt_sha256
    with store.session(fleet.engine, write=False) as s:
        trace = queries.traces.trace(s, named)
        assert trace is not None and (trace.prompt_key, trace.answer_key) == ("", "")


def test_a_purge_takes_out_of_the_index_what_it_says_of_a_request(fleet: Fleet) -> None:
    first = fleet.turn(ONE, FIRST, ANSWER)
    selector = Selector("request", str(first), utc_now())
    number = begin_purge(fleet.engine, selector, actor="ada", reason="asked to")
    with store.reading(fleet.engine) as connection:
        condition = selector.condition(connection)
    assert purge_chunk(fleet.engine, number, condition) is not None
    assert purge_chunk(fleet.engine, number, condition) is None
    (row,) = fleet.rows(fleet.turn(ONE, SECOND, [11, 12]))
    assert split_key(row) == row.prompt_sha256, "nobody remembers the first turn"


def test_a_spool_from_before_has_no_tokens_and_its_requests_are_conversations_of_their_own(
    fleet: Fleet,
) -> None:
    request_id = fleet.turn(ONE, FIRST, ANSWER)
    row = trace_row(request_id, output_start=4, prompt_sha256=sha256_ints(FIRST))
    fields = msgspec.structs.astuple(row)
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(fields[:-1]), type=type(row))
    assert old.tokens == b""
    fleet.stores[TWO].add([old])
    (stored,) = fleet.rows(request_id)
    assert split_key(stored) == stored.prompt_sha256
