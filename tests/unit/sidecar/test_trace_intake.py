"""Messages of the trace socket, and rows out of the engine's ring."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from aurora_sgl import wire
from aurora_sgl.sidecar.traces.assembler import TraceAssembler
from aurora_sgl.sidecar.traces.intake import TraceIntake
from aurora_sgl.trace_ring import RingWriter

SIZE = 1 << 20


@pytest.fixture
def ring() -> Iterator[RingWriter]:
    writer = RingWriter(SIZE)
    yield writer
    writer.close()


def header(
    request_id: int, start: int, rows: int, *, final: bool = False, **at: int
) -> wire.TraceHeader:
    tokens = [1] * rows
    return wire.TraceHeader(1, request_id, start, tokens, "float32", 6, 2, final, 4, True, [], **at)


def filled(ring: RingWriter, rows: int) -> dict[str, int]:
    position = ring.allocate(rows * 32)
    assert position is not None
    ring.rows(position, 1, rows * 32)[0] = 1
    return {
        "aux_at": position,
        "aux_bytes": rows * 24,
        "last_at": position + rows * 24,
        "last_bytes": rows * 8,
    }


def intake(limit: int = SIZE) -> tuple[TraceIntake, TraceAssembler]:
    assembler = TraceAssembler(limit)
    for request_id in range(1, 10):
        assembler.heard(
            wire.RequestStarted(request_id, 0, "r", 0, "", "", 0, 0, {}, True, True, True)
        )
    return TraceIntake(assembler), assembler


def batch(
    ring: RingWriter, *headers: wire.TraceHeader, given_up: tuple[int, ...] = ()
) -> list[bytes]:
    return [wire.encode(wire.TraceBatch(1, ring.path, ring.head, list(headers), list(given_up)))]


def test_rows_of_several_requests_are_taken_and_freed(ring: RingWriter) -> None:
    taker, assembler = intake()
    headers = [header(n, 0, 5, final=True, **filled(ring, 5)) for n in (1, 2)]
    taker.take(batch(ring, *headers))
    assert ring.freed == ring.head == 320
    assert ring.waiting == assembler.finished_bytes > 0
    traces = assembler.take_finished(8)
    assert [trace.rows for trace in traces] == [5, 5]
    assert all((trace.aux == 1).all() and (trace.last == 1).all() for trace in traces)
    taker.report(7)
    assert ring.waiting == 7
    taker.close()


def test_a_word_without_rows_frees_what_an_earlier_sidecar_left(ring: RingWriter) -> None:
    ring.allocate(1000)
    taker, _ = intake()
    taker.take(batch(ring))
    assert ring.freed == 1000
    taker.close()


def test_given_up_requests_are_forgotten(ring: RingWriter) -> None:
    taker, assembler = intake()
    taker.take(batch(ring, header(1, 0, 5, **filled(ring, 5))))
    taker.take(batch(ring, given_up=(1, 2)))
    assert len(assembler) == 0 and assembler.dropped == {"given_up": 1}
    taker.close()


@pytest.mark.parametrize(
    "at",
    [
        {"aux_at": SIZE - 4, "aux_bytes": 24},
        {"aux_at": -9, "aux_bytes": 24},
        {"aux_at": 0, "aux_bytes": -1},
        {"aux_at": 0, "aux_bytes": 23},
    ],
)
def test_a_header_that_makes_no_sense_drops_its_request_alone(
    ring: RingWriter, at: dict[str, int]
) -> None:
    taker, assembler = intake()
    good = header(1, 0, 5, **filled(ring, 5))
    taker.take(batch(ring, header(2, 0, 1, **at), good))
    assert len(assembler) == 1 and ring.freed == ring.head
    taker.take(batch(ring, header(2, 1, 1, final=True, **filled(ring, 1))))
    assert len(assembler) == 1, "nothing more is taken of it"
    taker.close()


def test_a_ring_that_cannot_be_opened_drops_its_traces() -> None:
    taker, assembler = intake()
    gone = wire.TraceBatch(1, "/proc/1/fd/99999", 10, [header(1, 0, 1), header(2, 0, 1)])
    for _ in range(2):
        taker.take([wire.encode(gone)])
    assert len(assembler) == 0
    taker.close()


@pytest.mark.parametrize("frames", [[b""], [b"\xc1"], [b"\x93\x01\x02\x03"], [b"", b""]])
def test_what_is_no_message_is_counted(frames: list[bytes]) -> None:
    taker, assembler = intake()
    taker.take(frames)
    assert assembler.dropped == {"malformed": 1}


def test_messages_with_rows_in_their_frames_are_still_taken() -> None:
    taker, assembler = intake()
    rows = np.ones(6, np.float32).tobytes(), np.ones(2, np.float32).tobytes()
    taker.take([wire.encode(header(1, 0, 1, final=True)), *rows])
    assert assembler.take_finished(1)[0].rows == 1
