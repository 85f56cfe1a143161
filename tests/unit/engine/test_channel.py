"""The scheduler's end of the sockets: what cannot be sent is dropped and counted, it alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from aurora_sgl import wire
from aurora_sgl.engine.channel import Channel

BOOT = 77


def finished(number: int, **odd: Any) -> wire.RequestFinished:
    values: dict[str, Any] = {
        "request_id": wire.request_id(BOOT, number),
        "at_us": number,
        "status": "finished",
        "finish_reason": "stop",
        "completion_tokens": 1,
        "cached_tokens": 0,
        "verify_steps": 0,
        "proposed": 0,
        "accepted": 0,
        "retractions": 0,
    }
    return wire.RequestFinished(**{**values, **odd})


#: What msgpack has no form for.
ODD: dict[str, dict[str, Any]] = {
    "half an emoji": {"finish_reason": "\ud83d"},
    "half an emoji at the end": {"finish_reason": "fine until \udc00"},
    "a number of 81 bits": {"completion_tokens": 1 << 80},
    "a negative one": {"cached_tokens": -(1 << 70)},
    "an object": {"finish_reason": object()},
}


class Other:
    """The sidecar's end of the sockets."""

    def __init__(self, endpoint: Path) -> None:
        self._context = zmq.Context()
        self.records, self.traces = self._context.socket(zmq.PULL), self._context.socket(zmq.PULL)
        self.commands = self._context.socket(zmq.PUSH)
        self.sockets = {"records": self.records, "traces": self.traces, "commands": self.commands}
        for name, socket in self.sockets.items():
            socket.linger = 0
            socket.rcvtimeo = 5000
            socket.bind(f"ipc://{endpoint / name}")

    def envelope(self) -> wire.Envelope:
        return wire.decode_envelope(self.records.recv())

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    other = Other(tmp_path)
    yield other
    other.close()


@pytest.fixture
def channel(tmp_path: Path, other: Other) -> Channel:
    channel = Channel(tmp_path, BOOT, 100)
    channel.put([finished(1)])
    deadline = time.monotonic() + 5
    while channel.waiting_records and time.monotonic() < deadline:  # until the sockets have met
        channel.flush()
        time.sleep(0.01)
    assert other.envelope().seq == 1
    return channel


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_record_that_cannot_be_encoded_is_dropped_and_counted_its_neighbours_are_not(
    channel: Channel, other: Other, odd: dict[str, Any]
) -> None:
    channel.put([finished(2), finished(3, **odd), finished(4)])
    channel.put([finished(5, **odd)])
    channel.put([finished(6)])
    first, second = other.envelope(), other.envelope()
    assert [record.request_id & 0xFF for record in first.records] == [2, 4]  # type: ignore[union-attr]
    assert [record.request_id & 0xFF for record in second.records] == [6]  # type: ignore[union-attr]
    assert (first.seq, second.seq) == (2, 3)  # without a gap: nothing was lost on the way
    assert (channel.dropped_odd, channel.dropped_records, channel.waiting_records) == (2, 2, 0)
    assert (first.before, second.before) == (1, 3)  # records that were sent before them


def test_an_odd_record_does_not_wait_at_the_head_while_there_is_no_sidecar(tmp_path: Path) -> None:
    channel = Channel(tmp_path / "nobody", BOOT, 8)
    for number in range(1, 5):
        channel.put([finished(number, **ODD["half an emoji"]), finished(number + 10)])
    assert (channel.dropped_odd, channel.waiting_records) == (1, 7)  # only the head was tried
    channel.put([finished(20), finished(21)])
    assert channel.dropped_records == 3  # the buffer is full


def test_words_about_traces_are_sent_and_without_a_sidecar_refused(
    channel: Channel, other: Other
) -> None:
    def batch(end: int) -> wire.TraceBatch:
        header = wire.TraceHeader(BOOT, 1, 0, [1], "float32", 4, 0, False, 1, True, [])
        return wire.TraceBatch(BOOT, "/proc/1/fd/1", end, [header])

    deadline = time.monotonic() + 5
    while not channel.send_traces(batch(1)) and time.monotonic() < deadline:
        time.sleep(0.01)  # until the sockets have met
    assert channel.send_traces(batch(2))
    sent = [wire.decode_trace_batch(other.traces.recv_multipart()[0]).end for _ in range(2)]
    assert sent == [1, 2]


def test_a_command_that_cannot_be_read_is_left_and_the_next_one_taken(
    channel: Channel, other: Other
) -> None:
    for data in (b"", b"\xc1", wire.encode(wire.Envelope(1, 1, [])), b"\x93\xa6future\x01\x02"):
        other.commands.send(data)
    other.commands.send(wire.encode(wire.SetCapture(0.5)))
    found, deadline = None, time.monotonic() + 5
    while found is None and time.monotonic() < deadline:
        found = channel.receive()
    assert found == wire.SetCapture(0.5)
    assert channel.unread_commands == 4
