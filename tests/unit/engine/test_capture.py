"""From forwards to whole traces: every row at its place, and bounds that hold."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_sgl.engine import copier
from aurora_sgl.engine.draft_tree import VerifyObservation
from aurora_sgl.engine.forward_rows import ForwardRows, Layout
from aurora_sgl.engine.request_state import RequestState
from tests.support.capture_parts import MIB, SHAPE, House, eventually


@pytest.fixture
def house() -> Iterator[House]:
    one = House()
    yield one
    one.close()


def built(trace: Any, dtype: torch.dtype = torch.float32) -> tuple[list[float], list[float]]:
    """First value of each row's auxiliary and last states."""
    aux = torch.from_numpy(trace.aux.copy()).view(dtype)
    last = torch.from_numpy(trace.last.copy()).view(dtype)
    assert (aux == aux[:, :1]).all() and (last == last[:, :1]).all()
    return aux[:, 0].tolist(), last[:, 0].tolist()


def test_prefill_chunks_and_steps_become_one_trace(house: House) -> None:
    req, state = house.begin(40)
    house.prefill(req, state, 0, 24)
    house.prefill(req, state, 24, 16)
    house.step([(req, state)], [3])
    house.step([(req, state)], [1])
    house.step([(req, state)], [4], ends=(0,))
    trace = house.trace()
    aux, last = built(trace)
    assert aux == list(range(48)) and last == [-n for n in range(48)]
    assert trace.tokens.tolist() == [*range(100, 140), *range(500, 509)]
    assert trace.step_starts.tolist() == [40, 43, 44]
    assert trace.start == 0 and trace.header.output_start == 40 and trace.header.greedy


def test_in_bfloat16_too() -> None:
    house = House(dtype=torch.bfloat16)
    req, state = house.begin(20)
    house.prefill(req, state, 0, 20)
    house.step([(req, state)], [3], ends=(0,))
    assert built(house.trace(), torch.bfloat16)[0] == list(range(23))
    house.close()


def test_requests_of_one_step_each_get_their_own_rows(house: House) -> None:
    some = [house.begin(8 + n) for n in range(5)]
    for req, state in some:
        house.prefill(req, state, 0, len(req.origin_input_ids))
    untraced = (some[2][0], house.begin(4, 0)[1])
    untraced[1].trace = None
    some[2][1].trace.broken = True  # type: ignore[union-attr]
    house.step(some, [1, 2, 3, 4, 1])
    house.step(some, [4, 3, 2, 1, 2], ends=(0, 1, 2, 3, 4))
    house.settled()
    lengths = {}
    for _ in range(4):
        trace = house.trace()
        aux, _last = built(trace)
        assert aux == list(range(trace.rows))
        lengths[trace.header.output_start] = trace.rows
    assert lengths == {8: 13, 9: 14, 11: 16, 12: 15}


def test_a_cached_prefix_has_tokens_and_no_rows(house: House) -> None:
    req, state = house.begin(30)
    house.prefill(req, state, 20, 10)
    house.step([(req, state)], [2], ends=(0,))
    trace = house.trace()
    assert (trace.start, built(trace)[0]) == (20, list(range(20, 32)))
    assert len(trace.tokens) == 33


def test_a_step_that_goes_on_past_a_stop_leaves_what_the_client_gets(house: House) -> None:
    req, state = house.begin(10)
    house.prefill(req, state, 0, 10)
    req.finished_len = 2
    house.step([(req, state)], [4], ends=(0,))
    trace = house.trace()
    assert built(trace)[0] == list(range(12)) and trace.tokens.tolist()[10:] == [500, 501]


def test_a_request_that_ends_at_its_first_token_is_a_trace(house: House) -> None:
    req, state = house.begin(6)
    house.prefill(req, state, 0, 6)
    house.finish(req, state)
    assert built(house.trace())[0] == list(range(6))


def test_a_retracted_request_is_prefilled_again_and_goes_on(house: House) -> None:
    req, state = house.begin(10)
    house.prefill(req, state, 0, 10)
    house.step([(req, state)], [3])
    aux, last = house.forward(13, 0)
    gathered = house.capture.gather(aux, last)
    house.capture.prompt_rows(gathered, req, state, 0, 0, 13)  # prompt and answer in one prefill
    house.capture.hand_over(gathered)
    house.step([(req, state)], [2], ends=(0,))
    trace = house.trace()
    assert built(trace)[0] == list(range(15))
    assert trace.tokens.tolist() == [*range(100, 110), *range(500, 506)]


def test_steps_and_prefills_without_rows_add_nothing(house: House) -> None:
    req, state = house.begin(5)
    house.prefill(req, state, 0, 0)
    house.prefill(req, state, 0, 5)
    req.finished_len = 0
    house.step([(req, state)], [2], ends=(0,))
    trace = house.trace()
    assert (trace.rows, trace.step_starts.tolist()) == (5, [])


def test_a_forward_without_last_states_ends_the_trace(house: House) -> None:
    req, state = house.begin(5)
    gathered = house.capture.gather(house.forward(5)[0], None)
    house.capture.prompt_rows(gathered, req, state, 0, 0, 5)
    house.capture.hand_over(gathered)
    house.finish(req, state)
    assert house.capture.dropped == {"no_rows": 1}
    eventually(lambda: house.capture.counters()["trace_bytes_reserved"] == 0)


def test_rows_go_round_the_ring_many_times(house: House) -> None:
    rows = 5 * MIB // (4 * 8 * 4)
    req, state = house.begin(rows)
    for start in range(0, rows, 1000):
        house.prefill(req, state, start, min(1000, rows - start))
    house.finish(req, state)
    trace = house.trace()
    assert built(trace)[0] == [float(n) for n in range(rows)]
    ring = house.copier._ring
    assert ring is not None and ring.head > 4 * ring.size


def test_one_chunk_larger_than_the_ring_goes_through_it_in_parts(house: House) -> None:
    rows = 3 * MIB // (4 * 8 * 4)
    req, state = house.begin(rows)
    house.prefill(req, state, 0, rows)
    house.finish(req, state)
    assert built(house.trace())[0] == [float(n) for n in range(rows)]
    assert sum(bool(batch.headers) for batch in house.batches) > 10


def test_bytes_are_reserved_until_the_sidecar_has_the_trace(house: House) -> None:
    house.reads = False
    req, state = house.begin(10)
    reserved = house.budget.reserved
    assert reserved > 0
    house.prefill(req, state, 0, 10)
    house.finish(req, state)
    house.settled()
    assert house.capture.counters()["trace_bytes_reserved"] == reserved
    house.reads = True
    house.read()
    assert house.capture.counters()["trace_bytes_reserved"] == 0
    assert house.copier.waiting > 0, "now it is the sidecar's to say"
    house.trace()
    house.intake.report(0)
    assert house.copier.waiting == 0


def test_a_sidecar_that_does_not_read_ends_admissions_and_bounds_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copier, "PATIENCE", 0.3)
    monkeypatch.setattr(copier, "BEHIND_SECONDS", 0.5)
    house = House(most_held=2 * MIB)
    house.reads = False
    rows = 4 * MIB // (4 * 8 * 4)
    longest = 0.0
    for _ in range(12):
        req, state = house.begin(rows)
        for start in range(0, rows, 4096):
            begun = time.perf_counter()
            house.prefill(req, state, start, 4096)
            longest = max(longest, time.perf_counter() - begun)
            assert house.copier.held <= 2 * MIB
            time.sleep(0.02)
        house.finish(req, state)
    eventually(lambda: house.copier.held == 0)
    assert eventually(house.copier.is_behind)
    assert house.capture.choose(10, 10) == 0
    counters = house.capture.counters()
    assert counters["traces_refused_behind"] > 0 and counters["dropped_traces"] > 0
    assert longest < 1.0, "it waits in a thread of its own"
    # When it reads again, all is as before.
    house.reads = True
    house.read()
    eventually(lambda: not house.copier.is_behind())
    req, state = eventually(lambda: (one := house.begin(10))[1].trace and one)
    house.prefill(req, state, 0, 10)
    house.finish(req, state)
    assert house.trace().rows == 10
    eventually(lambda: house.capture.counters()["trace_bytes_reserved"] == 0)
    house.close()


def test_while_the_ring_is_full_only_traced_rows_are_kept_and_none_is_lost(house: House) -> None:
    """A forward of 16 requests, of which one is traced, keeps the rows of all of them."""
    house.reads = False
    req, state = house.begin(8192, 100)  # fills the ring
    house.prefill(req, state, 0, 8192)
    others = [house.begin(4)[0] for _ in range(15)]
    for other in others:
        other.output_ids.append(1)
    for _ in range(20):
        states = [RequestState(0, False, True, True, 0) for _ in others]
        pairs = [(req, state), *zip(others, states, strict=True)]
        house.step(pairs, [3] * 16)
    eventually(lambda: len(house.copier._outbox) >= 20)
    eventually(lambda: house.copier.held <= 20 * 3 * 4 * 8 * 4)
    house.reads = True
    house.read()
    house.finish(req, state)
    assert built(house.trace())[0] == [float(n) for n in range(8252)]


def test_a_sidecar_that_is_started_anew_frees_what_the_dead_one_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copier, "PATIENCE", 0.2)
    house = House()
    house.reads = False
    rows = 3 * MIB // (4 * 8 * 4)
    req, state = house.begin(rows)
    house.prefill(req, state, 0, rows)
    eventually(lambda: house.copier.dropped["behind"])
    house.is_there = False
    house.finish(req, state)
    house.start_sidecar_anew()
    eventually(lambda: not house.copier.is_behind())
    eventually(lambda: house.capture.counters()["trace_bytes_reserved"] == 0)
    req, state = house.begin(10)
    house.prefill(req, state, 0, 10)
    house.finish(req, state)
    assert house.trace().rows == 10
    house.close()


def test_a_sidecar_that_comes_late_is_waited_for(house: House) -> None:
    house.is_there = False
    req, state = house.begin(10)
    house.prefill(req, state, 0, 10)
    time.sleep(0.2)
    house.is_there = True
    house.finish(req, state)
    assert house.trace().rows == 10


def test_without_any_sidecar_admissions_stop_until_one_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copier, "PATIENCE", 0.1)
    house = House()
    house.is_there = False
    req, state = house.begin(10)
    house.prefill(req, state, 0, 10)
    eventually(house.copier.is_behind)
    house.finish(req, state)
    assert house.begin(10)[1].trace is None
    house.is_there = True
    eventually(lambda: not house.copier.is_behind())
    assert house.begin(10)[1].trace is not None
    house.close()


def test_an_answer_that_outgrows_every_budget_is_dropped_alone(house: House) -> None:
    house.budget.request_bytes = house.budget.bytes_of(60)
    house.budget._long = 2
    req, state = house.begin(20, 1000)
    other = house.begin(8, 4)
    for one in ((req, state), other):
        house.prefill(*one, 0, len(one[0].origin_input_ids))
    eventually(lambda: len(house.assembler) == 2)  # the sidecar has something to give up
    house.step([(req, state), other], [1, 3], ends=(1,))
    for _ in range(12):
        house.step([(req, state)], [4])
    assert house.capture.dropped == {"outgrown": 1}
    house.finish(req, state)
    assert house.trace().rows == 11
    eventually(lambda: house.assembler.dropped == {"given_up": 1})
    eventually(lambda: house.capture.counters()["trace_bytes_reserved"] == 0)
    assert house.assembler.bytes == 0


def test_an_answer_longer_than_expected_takes_more_if_there_is_more(house: House) -> None:
    house.budget._long = 2
    req, state = house.begin(20, 1000)
    house.prefill(req, state, 0, 20)
    for _ in range(30):
        house.step([(req, state)], [4])
    house.finish(req, state)
    assert house.trace().rows == 140


def test_requests_that_are_let_go_give_their_bytes_back(house: House) -> None:
    begun = [house.begin(10) for _ in range(3)]
    for req, state in begun:
        house.prefill(req, state, 0, 10)
    for _, state in begun:
        house.capture.let_go(state.request_id, "lost")
        house.capture.let_go(state.request_id, "lost")
    eventually(lambda: house.capture.counters()["trace_bytes_reserved"] == 0)
    eventually(lambda: house.assembler.bytes == 0)
    assert house.capture.counters()["traces_dropped_lost"] == 3


def test_a_mistake_in_one_item_drops_its_traces_and_no_others(house: House) -> None:
    first, second = house.begin(10), house.begin(10)
    aux, last = house.forward(10)
    gathered = house.capture.gather(aux, last)
    house.capture.prompt_rows(gathered, *first, 0, 5, 10)  # rows that the forward has not
    house.capture.hand_over(gathered)
    house.finish(*first)
    house.prefill(*second, 0, 10)
    house.finish(*second)
    assert house.trace().header.request_id == second[1].request_id
    assert house.copier.dropped == {"failed": 1}
    eventually(lambda: house.capture.counters()["trace_bytes_reserved"] == 0)


def test_no_file_is_left_and_none_was_there(house: House) -> None:
    before = {path.name for path in Path("/dev/shm").glob("aurora*")}
    req, state = house.begin(10)
    house.prefill(req, state, 0, 10)
    house.finish(req, state)
    house.trace()
    assert {path.name for path in Path("/dev/shm").glob("aurora*")} <= before


def test_without_memory_for_a_ring_nothing_is_traced(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(size: int) -> None:
        raise OSError(12, "no memory")

    monkeypatch.setattr(copier, "RingWriter", none)
    req, state = house.begin(10)
    house.prefill(req, state, 0, 10)
    house.finish(req, state)
    eventually(lambda: house.copier.is_behind())
    assert house.capture.choose(10, 10) == 0
    eventually(lambda: house.capture.counters()["trace_bytes_reserved"] == 0)


def test_where_only_traced_rows_came_from_a_device_they_are_found_by_their_block() -> None:
    house = House()
    some = [house.begin(4) for _ in range(3)]
    step = SimpleNamespace(
        observation=VerifyObservation(
            *(torch.zeros(0),) * 3, torch.zeros(0), None, SHAPE, 0, 0, 0, False, blocks={0: 0, 2: 1}
        ),
        paths=[[0, 3, -1, -1], [4, -1, -1, -1], [8, 11, 10, -1]],
    )
    rows = ForwardRows(Layout("float32", 24, 8, 4), torch.zeros(8, 24), torch.zeros(8, 8))
    rows.step = step  # type: ignore[assignment]
    for row, count in ((0, 2), (2, 3)):
        trace = some[row][1].trace
        assert trace is not None
        rows.marks.append((trace, row, 10, [1] * count))
    first, second = rows.all_spans()
    assert (list(first.aux), list(first.last)) == ([0, 1], [0, 3])
    assert (list(second.aux), list(second.last)) == ([4, 5, 6], [4, 7, 6])
    house.close()


def test_a_request_of_a_server_whose_rows_are_not_known_yet_reserves_nothing(house: House) -> None:
    house.capture._layout = None
    _, state = house.begin(10)
    assert state.trace is None
    house.budget.clock = lambda: time.monotonic() + 1000
    house.budget.choose(1, 1)
    assert house.budget.reserved == house.budget.expected(1, 1)
