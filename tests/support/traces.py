"""Rows of traces, as a sidecar sends them through its spool."""

from __future__ import annotations

from typing import Any

from msgspec import structs
from sqlalchemy.orm import Session

from aurora_sgl.sidecar.traces.writer import TraceRow
from aurora_sgl.store import queries


def trace_row(request_id: int, **changes: Any) -> TraceRow:
    fields: dict[str, Any] = {
        "uri": f"traces/x/{request_id}.safetensors", "bytes": 100, "sha256": "", "created_us": 0,
        "start": 0, "end": 9, "output_start": 3, "prompt_sha256": "", "head_sha256": "",
        "greedy": True, "aux_width": 9, "last_width": 3, "dtype": "bfloat16", **changes,
    }  # fmt: skip
    return TraceRow(request_id=request_id, **fields)


def add_trace(s: Session, request_id: int) -> TraceRow:
    """The row of a trace in the store, without its file."""
    row = trace_row(request_id)
    fields = structs.asdict(row)
    del fields["created_us"], fields["tokens"]
    queries.traces.add_trace(s, **fields)
    return row
