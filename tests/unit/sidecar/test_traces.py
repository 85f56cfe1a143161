"""Chunks of hidden states become one trace; the file is a plain safetensors file."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from aurora_sgl import wire
from aurora_sgl.sidecar.traces.assembler import AssembledTrace, TraceAssembler
from aurora_sgl.sidecar.traces.writer import write_safetensors

AUX, LAST = 6, 2


def started(request_id: int = 1, may_train: bool = True) -> wire.RequestStarted:
    return wire.RequestStarted(request_id, 0, "r", 0, "d", "", 0, 0, {}, may_train, True, True)


def header(at: int, tokens: list[int], **changes: object) -> wire.TraceHeader:
    fields = {
        "boot_id": 1,
        "request_id": 1,
        "start": at,
        "tokens": tokens,
        "dtype": "float32",
        "aux_width": AUX,
        "last_width": LAST,
        "final": False,
        "output_start": 4,
        "greedy": True,
        "step_starts": [],
        **changes,
    }
    return wire.TraceHeader(**fields)  # type: ignore[arg-type]


def rows(first: int, count: int, width: int, salt: float = 0.0) -> bytes:
    """Row of position p holds p + salt."""
    return np.repeat(np.arange(first, first + count, dtype=np.float32) + salt, width).tobytes()


def chunk(assembler: TraceAssembler, start: int, count: int, *, extra: int = 0, salt: float = 0.0,
          **changes: object) -> None:  # fmt: skip
    tokens = [100 + p for p in range(start, start + count + extra)]
    assembler.add(
        header(start, tokens, **changes),
        rows(start, count, AUX, salt),
        rows(start, count, LAST, salt),
    )


def only(assembler: TraceAssembler) -> AssembledTrace:
    (trace,) = assembler.take_finished(8)
    assert len(assembler) == 0 and assembler.bytes == 0
    return trace


def values(trace: AssembledTrace) -> list[float]:
    return trace.aux.view(np.float32)[:, 0].tolist()


def test_a_cached_prefix_gives_tokens_without_rows_and_the_last_token_has_none() -> None:
    assembler = TraceAssembler(1 << 20)
    assembler.heard(started())
    assembler.add(header(0, [100, 101, 102, 103]), b"", b"")
    chunk(assembler, 2, 2)
    chunk(assembler, 4, 3, step_starts=[4, 6])
    chunk(assembler, 7, 1, extra=1, final=True, step_starts=[7])
    trace = only(assembler)
    assert trace.tokens.tolist() == list(range(100, 109))
    assert (trace.start, trace.rows) == (2, 6)
    assert values(trace) == [2, 3, 4, 5, 6, 7]
    assert trace.last.view(np.float32).shape == (6, LAST)
    assert trace.step_starts.tolist() == [4, 6, 7]


def test_a_retracted_request_sends_positions_again_and_the_later_ones_win() -> None:
    assembler = TraceAssembler(1 << 20)
    assembler.heard(started())
    chunk(assembler, 0, 6)
    chunk(assembler, 3, 4, salt=0.5, final=True)
    assert values(only(assembler)) == [0, 1, 2, 3.5, 4.5, 5.5, 6.5]


def test_of_rows_with_a_hole_the_run_with_the_answer_is_kept() -> None:
    assembler = TraceAssembler(1 << 20)
    assembler.heard(started())
    assembler.add(header(0, [100 + p for p in range(12)], output_start=8), b"", b"")
    chunk(assembler, 0, 6, output_start=8)
    chunk(assembler, 8, 4, output_start=8, final=True)
    trace = only(assembler)
    assert (trace.start, values(trace)) == (8, [8, 9, 10, 11])


def test_a_request_whose_first_tokens_are_missing_is_dropped_and_counted() -> None:
    assembler = TraceAssembler(1 << 20)
    assembler.heard(started())
    chunk(assembler, 3, 4, final=True)
    assert assembler.take_finished(8) == []
    assert assembler.dropped == {"incomplete": 1}


def test_nothing_is_kept_of_a_request_that_may_not_train() -> None:
    assembler = TraceAssembler(1 << 20)
    chunk(assembler, 0, 4)
    assembler.heard(started(may_train=False))
    chunk(assembler, 4, 1, final=True)
    assert assembler.take_finished(8) == []
    assert len(assembler) == 0


def test_without_word_of_consent_a_trace_waits_and_then_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assembler = TraceAssembler(1 << 20)
    chunk(assembler, 0, 4, final=True)
    assert assembler.take_finished(8) == []
    assert len(assembler) == 1
    monkeypatch.setattr("aurora_sgl.sidecar.traces.assembler.CONSENT_SECONDS", 0.0)
    assert assembler.take_finished(8) == []
    assert assembler.dropped == {"no_consent": 1}


def test_the_request_that_would_pass_the_bound_is_dropped_and_no_other() -> None:
    assembler = TraceAssembler(3000)
    for request_id in range(1, 30):
        assembler.heard(started(request_id))
        chunk(assembler, 0, 10, request_id=request_id)
        assert assembler.bytes <= 3000
    kept = len(assembler)
    assert kept == 7 and assembler.dropped == {"memory": 22}
    for start in range(10, 400, 10):  # one long request does not drive the others out
        chunk(assembler, start, 10, request_id=1)
    assert len(assembler) == kept - 1 and assembler.dropped == {"memory": 23}
    for request_id in range(2, 8):
        assembler.add(header(10, [1], final=True, request_id=request_id), b"", b"")
    traces = assembler.take_finished(8)
    assert [trace.header.request_id for trace in traces] == [*range(2, 8)]
    assert assembler.bytes == 0 and assembler.finished_bytes == 0


def test_nothing_more_is_taken_of_a_request_that_was_given_up() -> None:
    assembler = TraceAssembler(1 << 20)
    assembler.heard(started())
    chunk(assembler, 0, 10)
    assembler.give_up(1, "given_up")
    chunk(assembler, 10, 10, final=True)
    assert len(assembler) == 0 and assembler.bytes == 0 and assembler.take_finished(8) == []
    assert assembler.dropped == {"given_up": 1}


def test_bytes_of_whole_traces_are_counted_until_they_are_taken() -> None:
    assembler = TraceAssembler(1 << 20)
    for request_id in (1, 2, 3):
        assembler.heard(started(request_id))
        chunk(assembler, 0, 10, request_id=request_id)
    assert assembler.finished_bytes == 0
    chunk(assembler, 10, 1, request_id=2, final=True)
    chunk(assembler, 11, 1, request_id=2, final=True)
    assert 0 < assembler.finished_bytes < assembler.bytes
    assembler.give_up(3, "given_up")
    only_one = assembler.take_finished(8)
    assert len(only_one) == 1 and assembler.finished_bytes == 0 < assembler.bytes


def test_a_request_that_never_finishes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assembler = TraceAssembler(1 << 20)
    assembler.heard(started())
    chunk(assembler, 0, 4)
    monkeypatch.setattr("aurora_sgl.sidecar.traces.assembler.IDLE_SECONDS", 0.0)
    assert assembler.take_finished(8) == []
    assert assembler.dropped == {"unfinished": 1}
    assert assembler.bytes == 0


@pytest.mark.parametrize(
    ("aux", "changes"),
    [(b"123", {}), (b"", {"dtype": "int8"}), (b"\0" * 4 * AUX * 9, {}), (b"", {"start": -1})],
)
def test_a_chunk_that_makes_no_sense_drops_its_request_alone(
    aux: bytes, changes: dict[str, object]
) -> None:
    assembler = TraceAssembler(1 << 20)
    assembler.heard(started(2))
    chunk(assembler, 0, 5, request_id=2)
    assembler.add(header(0, [1, 2, 3], **changes), aux, b"")
    assert assembler.dropped == {"malformed": 1}
    assert len(assembler) == 1


def test_the_file_is_read_by_safetensors_as_it_was_written(tmp_path: Path) -> None:
    exact = torch.randn(5, 3).to(torch.bfloat16)
    raw = exact.view(torch.uint8).numpy()
    file = io.BytesIO()
    digest = write_safetensors(
        file,
        {
            "tokens": ("int64", (4,), np.arange(4)),
            "aux": ("bfloat16", (5, 3), raw),
            "step_starts": ("int64", (0,), np.zeros(0, np.int64)),
        },
        {"format": "1"},
    )
    assert digest == hashlib.sha256(file.getvalue()).hexdigest()
    tensors = load(file.getvalue())
    assert torch.equal(tensors["aux"], exact)
    assert tensors["tokens"].tolist() == [0, 1, 2, 3]
    assert tensors["step_starts"].shape == (0,)
