"""What the frames of a spool hold."""

from __future__ import annotations

import msgspec

from aurora_sgl import wire

#: Kinds of spool frames.
ENVELOPE, TRACE, LOSS = b"E", b"T", b"L"


class LossFrame(msgspec.Struct, array_like=True, frozen=True):
    """Envelopes that the full spool refused, noted when it had room again."""

    boot_id: int
    envelopes: int
    records: int


class RawEnvelope(msgspec.Struct, array_like=True, frozen=True):
    """An envelope whose records were not looked at."""

    boot_id: int
    seq: int
    records: list[msgspec.Raw]
    before: int = 0


def open_envelope(data: bytes) -> tuple[wire.Envelope, list[bytes]]:
    """The envelope with the records that can be read, and the bytes of those that can't.

    Raises ``msgspec.DecodeError`` for bytes that are no envelope.
    """
    try:
        return wire.decode_envelope(data), []
    except msgspec.DecodeError:
        raw = msgspec.msgpack.decode(data, type=RawEnvelope)
    records: list[wire.Record] = []
    unreadable = []
    for one in raw.records:
        try:
            records.append(msgspec.msgpack.decode(one, type=wire.Record))
        except msgspec.DecodeError:
            unreadable.append(bytes(one))
    return wire.Envelope(raw.boot_id, raw.seq, records, raw.before), unreadable
