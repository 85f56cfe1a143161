"""The scheduler's end of the sockets to the sidecar. No call here ever waits.

Records are queued in a bounded buffer and sent as far as the socket takes them; what does not fit
is dropped and counted, and so is a record that cannot be encoded, it alone. Rows of hidden states
don't go this way, only the word where they lie (see ``copier``).
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

import msgspec
import zmq

from aurora_sgl import wire

logger = logging.getLogger("aurora_sgl")

_TRACE_BACKLOG = 256  # messages; their rows are in a ring of fixed size


class Channel:
    """Records and traces out, commands in."""

    def __init__(self, endpoint: Path, boot_id: int, buffer_records: int) -> None:
        self._boot_id = boot_id
        self._limit = buffer_records
        self._waiting: deque[list[wire.Record]] = deque()
        self._waiting_records = 0
        self._seq = 0
        self._sent = 0  # records in those envelopes
        self.dropped_records = 0
        self.dropped_odd = 0  # of the dropped records those that could not be sent
        self.unread_commands = 0
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
            try:
                data = self._encoded(records)
                if data is not None:
                    self._records.send(data, zmq.NOBLOCK)
                    self._seq += 1
                    self._sent += len(records)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                self._drop(len(records), error)
            self._waiting_records -= len(records)
            self._waiting.popleft()

    def _encoded(self, records: list[wire.Record]) -> bytes | None:
        """The next envelope, without the records that cannot be encoded; None: nothing is left."""
        try:
            return self._envelope(records)
        except Exception:  # a text that is no UTF-8, a number too large, an object of another kind
            sound = [record for record in records if self._can_encode(record)]
        self._waiting_records -= len(records) - len(sound)
        records[:] = sound  # so that the odd one is counted once, however often this is tried
        return self._envelope(sound) if sound else None

    def _envelope(self, records: list[wire.Record]) -> bytes:
        return wire.encode(wire.Envelope(self._boot_id, self._seq + 1, records, self._sent))

    def _can_encode(self, record: wire.Record) -> bool:
        try:
            wire.encode(wire.Envelope(self._boot_id, 0, [record]))
        except Exception as error:
            self._drop(1, error)
            return False
        return True

    def _drop(self, count: int, error: Exception) -> None:
        if self.dropped_odd == 0:
            logger.error("aurora: a record cannot be sent and is dropped", exc_info=error)
        self.dropped_odd += count
        self.dropped_records += count

    def send_traces(self, batch: wire.TraceBatch) -> bool:
        """Send headers of rows; False when the sidecar is not there, or behind. Called by one
        thread, which need not be the scheduler's: this socket is that thread's."""
        try:
            self._traces.send(wire.encode(batch), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> wire.Command | None:
        """The next command, or None. One that cannot be read, of another release of the sidecar,
        is counted and left."""
        while True:
            try:
                data = self._commands.recv(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                return wire.decode_command(data)
            except msgspec.MsgspecError as error:
                if self.unread_commands == 0:
                    logger.error("aurora: a command cannot be read and is left", exc_info=error)
                self.unread_commands += 1
