"""What the budgets of traces hold, and what is said when they hold too little."""

from __future__ import annotations

import pytest

from aurora_sgl.trace_format import row_bytes
from aurora_sgl.trace_room import TraceRoom

COUNTERS = {
    "trace_row_bytes": 65536.0,
    "trace_budget_disk": 2.0 * 1024**3,
    "trace_budget_unfinished": 512.0 * 1024**2,
    "trace_budget_second": 64.0 * 1024**2,
}


def room(mean: float = 0.0) -> TraceRoom:
    one = TraceRoom.of(COUNTERS, mean)
    assert one is not None
    return one


def test_budgets_are_told_in_tokens_and_once_requests_were_traced_in_requests() -> None:
    sentence = room().sentence()
    assert "64.0 KiB" in sentence and "32,768 tokens" in sentence and "8,192 tokens" in sentence
    assert "1,024 tokens" in sentence and "requests" not in sentence
    assert "about 64 requests" in room(32 * 1024**2).sentence()


def test_compact_files_hold_more_tokens_than_what_is_on_its_way() -> None:
    one = TraceRoom.of({**COUNTERS, "trace_file_row_bytes": 16384.0})
    assert one is not None and "64.0 KiB, 16.0 KiB in files" in one.sentence()
    assert "the files hold 131,072 tokens" in one.sentence() and "8,192 tokens" in one.sentence()


@pytest.mark.parametrize(
    ("mean_mib", "trigger", "speaks"),
    [(32, 200, True), (32, 64, False), (1, 200, False), (0, 200, False), (32, 0, False)],
)
def test_a_trigger_that_the_disk_budget_cannot_fill_is_told(
    mean_mib: int, trigger: int, speaks: bool
) -> None:
    problem = room(mean_mib * 1024.0**2).too_small_for(trigger)
    assert bool(problem) == speaks
    if speaks:
        assert "200 new requests" in problem and "about 64" in problem


def test_a_server_that_captures_nothing_has_no_room_to_tell_of() -> None:
    assert TraceRoom.of({}) is None and TraceRoom.of({"trace_row_bytes": 0.0}) is None


@pytest.mark.parametrize(
    ("server", "wanted"),
    [
        ({"target_hidden_size": 8192, "dtype": "bfloat16"}, 65536),
        ({"target_hidden_size": 4096, "aux_layers": [1], "dtype": "bfloat16"}, 16384),
        ({"target_hidden_size": 576, "aux_layers": [2, 9, 26], "dtype": "float32"}, 9216),
        ({"target_hidden_size": 576, "aux_layers": [2, 26], "dtype": "float16"}, 3456),
        ({}, 0),
    ],
)
def test_bytes_of_a_row_follow_from_what_a_server_says_of_itself(
    server: dict[str, object], wanted: int
) -> None:
    assert row_bytes(server) == wanted
