"""The trace file: names and metadata that the sidecar writes and training reads (safetensors).

Format 1 holds rows as the target computed them. Format 2 holds them compact (``compact_rows``): a
tensor ``x`` of format 1 is ``x.packed``, ``x.codes``, ``x.largest`` and ``x.channels`` there, and
the metadata says its width and bits. Only numpy's and Python's types: the sidecar loads no torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from aurora_sgl import compact_rows

FULL, COMPACT = "1", "2"

#: Tensors. ``TOKENS`` [T] int64 from position 0; ``AUX`` [n, aux_width] features of the target's
#: layers and ``LAST`` [n, H] its normed last hidden state, of positions start .. start + n - 1;
#: ``STEP_STARTS`` int64, the position of each verify step's bonus token.
TOKENS, AUX, LAST, STEP_STARTS = "tokens", "aux", "last", "step_starts"

#: What a header of ours stays far below, and a request.
_LONGEST_HEADER, _MOST_TOKENS = 1 << 20, 1 << 28
HEAD_TOKENS = 16  # tokens behind a trace's ``head_sha256``
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

#: Parts of a tensor of format 2, and the bits of a number. The last state is the teacher: an error
#: in it moves the distribution that is learnt.
PARTS = ("packed", "codes", "largest", "channels")
BITS = {AUX: 4, LAST: 6}
#: From this hidden size on ``auto`` means compact: below it the default budget of files holds 200
#: requests of 1,000 tokens with full rows too.
WIDE = 2048


def row_bytes(server: Mapping[str, Any]) -> int:
    """Bytes of one token's hidden states at most, from what a server says of itself
    (``wire.Hello``): the layers that feed the drafter, and the last one. 0: it does not say."""
    hidden = int(server.get("target_hidden_size") or 0)
    layers = len(server.get("aux_layers") or ()) or 3
    return hidden * (layers + 1) * ITEM_BYTES.get(str(server.get("dtype", "")), 4)


class UnknownFormatError(Exception):
    """A trace file of a format that this version does not read; its text is the format."""


def is_compact(form: str, last_width: int) -> bool:
    """Whether rows are written compact under the setting ``capture_format`` (auto, full,
    compact)."""
    return form == "compact" or (form == "auto" and last_width >= WIDE)


def file_row_bytes(aux_width: int, last_width: int, item_bytes: int, form: str) -> int:
    """Bytes of one row in a file."""
    if not is_compact(form, last_width):
        return (aux_width + last_width) * item_bytes
    return compact_rows.row_bytes(aux_width, BITS[AUX]) + compact_rows.row_bytes(
        last_width, BITS[LAST]
    )


@dataclass(frozen=True)
class TraceMetadata:
    """What a file says of itself beside its tensors."""

    request_id: int
    output_start: int  # position of the first output token
    greedy: bool
    start: int  # position of the first row
    aux_layers: str = ""  # numbers, with commas
    target_model: str = ""
    format: str = FULL
    aux_width: int = 0  # of format 2, and so on
    aux_bits: int = 0
    last_width: int = 0
    last_bits: int = 0

    def to_text(self) -> dict[str, str]:
        """As safetensors' metadata, which is text."""
        return {name: _text(value) for name, value in asdict(self).items()}

    @classmethod
    def from_text(cls, text: Mapping[str, str]) -> TraceMetadata:
        """Raises ``KeyError`` or ``ValueError`` for a file that lacks what is needed, and
        ``UnknownFormatError`` for one of a later version."""
        if text.get("format", FULL) not in (FULL, COMPACT):
            raise UnknownFormatError(str(text["format"])[:20])
        numbers = ("aux_width", "aux_bits", "last_width", "last_bits")
        return cls(
            request_id=int(text["request_id"]),
            output_start=int(text["output_start"]),
            greedy=text.get("greedy", "1") == "1",
            start=int(text.get("start", "0")),
            aux_layers=text.get("aux_layers", ""),
            target_model=text.get("target_model", ""),
            format=text.get("format", FULL),
            **{name: int(text.get(name, "0")) for name in numbers},
        )


def tokens_of(file: IO[bytes]) -> NDArray[np.int64]:  # shape: [T]
    """The tokens of a trace file, and no more of it, without torch. Raises ``OSError``,
    ``ValueError``, ``KeyError`` or ``TypeError`` for what is no such file."""
    (length,) = struct.unpack("<Q", _exactly(file, 8))
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    entry = json.loads(_exactly(file, length))[TOKENS]
    begin, end = map(int, entry["data_offsets"])
    if entry["dtype"] != "I64" or not 0 <= begin <= end <= _MOST_TOKENS * 8 + begin:
        raise ValueError("tokens that are no list of numbers")
    file.seek(8 + length + begin)
    return np.frombuffer(_exactly(file, end - begin), "<i8")


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError("it is cut short")
    return data


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
