"""Prefixes that several traces share: noted, kept while needed, and counted, on both databases."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import from_us, utc_now
from aurora_sgl.erasure import purge
from aurora_sgl.limits import Limits
from aurora_sgl.sequences.prefixes import Prefixes
from aurora_sgl.sequences.trace_cache import TraceFiles
from aurora_sgl.sidecar.traces.assembler import AssembledTrace
from aurora_sgl.sidecar.traces.budget import TraceStore
from aurora_sgl.sidecar.traces.writer import TraceWriter
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.pruning import kept
from aurora_sgl.store.purge import Selector
from aurora_sgl.store.retention import prune
from tests.support import store_samples as samples

BOOT, HIDDEN = 77, 8
SYSTEM = list(range(1000, 1040))


class House:
    """A group, and the traces that its sidecar stores."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.root = ArtifactRoot(str(folder / "artifacts"))
        with store.session(engine) as s:
            self.group_id = queries.groups.ensure_group(s, "default", "target", "", "eagle3").id
            self.server_id = queries.servers.register_server(
                s, self.group_id, samples.hello(BOOT)
            ).id
        self.link = StoreLink(engine.url.render_as_string(hide_password=False))
        self.store = TraceStore(self.link, self.root)
        self.writer = TraceWriter(self.root, folder / "tmp")
        self.bytes = 0

    def serve(self, number: int, prompt: list[int], start: int) -> int:
        """A request that is served and traced; its rows before ``start`` came from the cache."""
        request_id = self.ran(number)
        self.stored(request_id, prompt, start)
        return request_id

    def ran(self, number: int) -> int:
        at_us = samples.START_US + number * 1_000_000
        rows = [samples.chain_step(number, 0, 1, at_us=at_us)]
        records = [
            samples.started(number, at_us=at_us), *rows,
            samples.finished(number, rows, at_us=at_us + 9),
        ]  # fmt: skip
        ingest(self.engine, self.server_id, BOOT, [(number, records)])
        return wire.request_id(BOOT, number)

    def stored(self, request_id: int, prompt: list[int], start: int) -> None:
        tokens = np.asarray([*prompt, 7, 8, 9, request_id % 997], np.int64)
        rows = len(tokens) - 1 - start
        header = wire.TraceHeader(
            BOOT, request_id, 0, [], "bfloat16", 3 * HIDDEN, HIDDEN, True, len(prompt), True, []
        )
        aux, last = (np.zeros((rows, 2 * w * HIDDEN), np.uint8) for w in (3, 1))
        trace = AssembledTrace(header, tokens, start, aux, last, np.zeros(0, np.int64))
        row = self.writer.write(trace, None)
        assert row is not None
        self.bytes = row.bytes
        self.store.add([row])

    def limit(self, trace_bytes: int) -> None:
        with store.session(self.engine) as s:
            queries.limits.set_limits(s, self.group_id, {"trace_bytes": trace_bytes}, "test")
        self.store.enforce(self.group_id)

    def usable(self) -> list[int]:
        """Numbers of the requests that a run could train on."""
        with store.session(self.engine, write=False) as s:
            rows = queries.requests.recent_requests(s, self.group_id)
            donors = queries.requests.donors(s, rows)
        prefixes = Prefixes([*rows, *donors], TraceFiles(self.root, self.folder / "cache"))
        return sorted(row.request_id & 0xFFFF for row in rows if prefixes.pieces(row) is not None)

    def counted(self) -> int:
        with store.session(self.engine, write=False) as s:
            return queries.requests.count_trainable(s, self.group_id)

    def donor(self, request_id: int) -> int | None:
        with store.session(self.engine, write=False) as s:
            trace = queries.traces.trace(s, request_id)
            assert trace is not None
            return trace.donor_id


@pytest.fixture
def house(engine: Engine, tmp_path: Path) -> House:
    return House(engine, tmp_path)


def question(number: int) -> list[int]:
    return [*SYSTEM, 2000 + number, 2001, 2002]


def test_the_oldest_trace_that_holds_the_system_prompt_of_many_stays(house: House) -> None:
    """The review's case: 0 of 39 later ones were usable when it went."""
    first = house.serve(1, question(1), 0)
    others = [house.serve(number, question(number), len(SYSTEM)) for number in range(2, 41)]
    assert {house.donor(one) for one in others} == {first}
    size = house.bytes
    with store.session(house.engine, write=False) as s:
        total = queries.traces.trace_bytes_total(s, house.group_id)
    house.limit(total - 19 * size)
    left = house.usable()
    assert left[0] == 1 and 15 <= len(left) < 40 and house.counted() == len(left)
    with store.session(house.engine, write=False) as s:
        rows = queries.requests.recent_requests(s, house.group_id)
        assert len(rows) == len(left), "nothing is kept that can't be used"


def test_a_turn_that_ends_before_the_one_whose_prefix_it_has_waits_for_it(house: House) -> None:
    early, late = house.ran(1), house.ran(2)
    house.stored(late, question(2), len(SYSTEM))
    assert house.donor(late) is None and house.counted() == 0 and house.usable() == []
    house.stored(early, question(1), 0)
    assert house.donor(late) == early and house.counted() == 2 and house.usable() == [1, 2]


def test_the_donor_has_the_same_tokens(house: House) -> None:
    """Same first 16 tokens, another system prompt behind them."""
    other = [*SYSTEM[:20], *range(500, 520), 1]
    house.serve(1, other, 0)
    own = house.serve(2, question(2), 0)
    house.serve(3, [*other[:-1], 2], len(SYSTEM))
    needs = house.serve(4, question(4), len(SYSTEM))
    short = house.serve(5, [*SYSTEM[:3], 9, 9, 9, 9], 3)
    assert house.donor(needs) == own and house.donor(short) is not None
    assert house.usable() == [1, 2, 3, 4, 5]


def test_a_chain_of_turns_is_followed_and_a_purged_donor_is_not_counted(house: House) -> None:
    prompt = question(1)
    ids, start = [], 0
    for number in range(1, 5):
        ids.append(house.serve(number, prompt, start))
        start = len(prompt)
        prompt = [*prompt, 7, 8, 9, *random.Random(number).sample(range(5000), 6)]
    assert [house.donor(one) for one in ids] == [None, *ids[:-1]]
    assert house.counted() == 4 and house.usable() == [1, 2, 3, 4]
    with store.session(house.engine) as s:
        queries.traces.pin_traces(s, ids, "test")
    house.root.delete(f"traces/{_day(house, ids[1])}/{ids[1]}.safetensors")
    with store.session(house.engine) as s:
        queries.traces.delete_traces(s, [ids[1]])
    assert house.usable() == [1] and house.counted() == 2, "the fourth's own donor is there"


def _day(house: House, request_id: int) -> str:
    with store.session(house.engine, write=False) as s:
        trace = queries.traces.trace(s, request_id)
        assert trace is not None
        return trace.uri.split("/")[1]


def test_pinned_traces_stay_up_to_a_share_with_their_donors_until_unpinned(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "HELD_OUT_SHARE", 0.0)  # which ones are is drawn by the store's salt
    first = house.serve(1, question(1), 0)
    ids = [house.serve(number, question(number), len(SYSTEM)) for number in range(2, 8)]
    for number in range(8, 20):
        house.serve(number, list(range(number, 60)), 0)
    with store.session(house.engine) as s:
        queries.traces.pin_traces(s, ids[:2], "reservoir")
        assert queries.traces.pinned_traces(s, house.group_id, "reservoir") == ids[:2]
        assert queries.traces.pinned_traces(s, house.group_id, "other") == []
        total = queries.traces.trace_bytes_total(s, house.group_id)
    house.limit(total - 5 * house.bytes)
    assert {1, 2, 3} <= set(house.usable()) and 4 not in house.usable()
    with store.session(house.engine) as s:
        queries.traces.unpin_traces(s, ids)
        assert queries.traces.pinned_traces(s, house.group_id) == []
    house.limit(total - 8 * house.bytes)
    assert min(house.usable()) > 7 and first == wire.request_id(BOOT, 1)


def test_a_purge_takes_pinned_traces_too(house: House) -> None:
    ids = [house.serve(number, question(number), 0) for number in (1, 2)]
    with store.session(house.engine) as s:
        queries.traces.pin_traces(s, ids, "reservoir")
    purge(
        house.engine, house.root, house.folder, Selector("rid", "rid-1", utc_now()),
        actor="ada", reason="asked to", wait_seconds=0.0,
    )  # fmt: skip
    with store.session(house.engine, write=False) as s:
        assert queries.traces.pinned_traces(s, house.group_id) == ids[1:]


def test_the_requests_of_pinned_traces_and_of_their_donors_stay(house: House) -> None:
    first = house.serve(1, question(1), 0)
    ids = [house.serve(number, question(number), len(SYSTEM)) for number in (2, 3)]
    with store.session(house.engine) as s:
        queries.traces.pin_traces(s, ids[:1], "shown to the team")
    later = from_us(samples.START_US + 400 * 86_400_000_000)
    limits = Limits(event_days=30, request_days=150)
    assert prune(house.engine, house.root, house.group_id, limits, now=later).requests == 1
    assert house.usable() == [1, 2] and first and ids
