"""The scheduler's end of the sockets to the sidecar. No call here ever waits.

Records are queued in a bounded buffer and sent as far as the socket takes them; what does not fit
is dropped and counted. ZeroMQ moves the bytes in a thread of its own, outside the interpreter lock.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import zmq

from aurora_sgl import wire

_TRACE_BACKLOG = 512  # messages of about 32 rows each


class Channel:
    """Records and traces out, commands in."""

    def __init__(self, endpoint: Path, boot_id: int, buffer_records: int) -> None:
        self._boot_id = boot_id
        self._limit = buffer_records
        self._waiting: deque[list[wire.Record]] = deque()
        self._waiting_records = 0
        self._seq = 0
        self.dropped_records = 0
        self.dropped_traces = 0
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._records = context.socket(zmq.PUSH)
        self._records.set_hwm(1000)
        self._traces = context.socket(zmq.PUSH)
        self._traces.set_hwm(_TRACE_BACKLOG)
        self._commands = context.socket(zmq.PULL)
        for socket, name in (
            (self._records, "records"),
            (self._traces, "traces"),
            (self._commands, "commands"),
        ):
            socket.setsockopt(zmq.LINGER, 0)
            # Nothing is queued inside ZeroMQ for a sidecar that is not there: it stays countable.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, 100)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            socket.connect(f"ipc://{endpoint / name}")

    @property
    def waiting_records(self) -> int:
        return self._waiting_records

    def put(self, records: list[wire.Record]) -> None:
        """Queue the records of one step and send what the socket takes."""
        if self._waiting_records + len(records) > self._limit:
            self.dropped_records += len(records)
        else:
            self._waiting.append(records)
            self._waiting_records += len(records)
        self.flush()

    def flush(self) -> None:
        """Send queued records until the socket would wait."""
        while self._waiting:
            records = self._waiting[0]
            envelope = wire.Envelope(self._boot_id, self._seq + 1, records)
            try:
                self._records.send(wire.encode(envelope), zmq.NOBLOCK)
            except zmq.Again:
                return
            self._seq += 1
            self._waiting_records -= len(records)
            self._waiting.popleft()

    def send_trace(self, header: wire.TraceHeader, aux: bytes, last: bytes) -> bool:
        """Send rows of hidden states, or drop and count them when the sidecar is behind."""
        try:
            self._traces.send_multipart([wire.encode(header), aux, last], zmq.NOBLOCK)
        except zmq.Again:
            self.dropped_traces += 1
            return False
        return True

    def receive(self) -> wire.Command | None:
        """The next command, or None."""
        try:
            data = self._commands.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return wire.decode_command(data)
