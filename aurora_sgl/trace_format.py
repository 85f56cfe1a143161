"""The trace file: names and metadata that the sidecar writes and training reads (safetensors).

Only numpy's and Python's types: the sidecar loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = "1"

#: Tensors. ``TOKENS`` [T] int64 from position 0; ``AUX`` [n, aux_width] features of the target's
#: layers and ``LAST`` [n, H] its normed last hidden state, of positions start .. start + n - 1;
#: ``STEP_STARTS`` int64, the position of each verify step's bonus token.
TOKENS, AUX, LAST, STEP_STARTS = "tokens", "aux", "last", "step_starts"

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def row_bytes(server: Mapping[str, Any]) -> int:
    """Bytes of one token's hidden states at most, from what a server says of itself
    (``wire.Hello``): the layers that feed the drafter, and the last one. 0: it does not say."""
    hidden = int(server.get("target_hidden_size") or 0)
    layers = len(server.get("aux_layers") or ()) or 3
    return hidden * (layers + 1) * ITEM_BYTES.get(str(server.get("dtype", "")), 4)


@dataclass(frozen=True)
class TraceMetadata:
    """What a file says of itself beside its tensors."""

    request_id: int
    output_start: int  # position of the first output token
    greedy: bool
    start: int  # position of the first row
    aux_layers: str = ""  # numbers, with commas
    target_model: str = ""

    def to_text(self) -> dict[str, str]:
        """As safetensors' metadata, which is text."""
        values = {name: _text(value) for name, value in asdict(self).items()}
        return {"format": FORMAT, **values}

    @classmethod
    def from_text(cls, text: Mapping[str, str]) -> TraceMetadata:
        """Raises ``KeyError`` or ``ValueError`` for a file that lacks what is needed."""
        return cls(
            request_id=int(text["request_id"]),
            output_start=int(text["output_start"]),
            greedy=text.get("greedy", "1") == "1",
            start=int(text.get("start", "0")),
            aux_layers=text.get("aux_layers", ""),
            target_model=text.get("target_model", ""),
        )


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
