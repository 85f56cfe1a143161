"""Writes finished traces as safetensors files and keeps them within their byte budget."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from aurora_sgl import clock, compact_rows, litter, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.private import make_folder
from aurora_sgl.sidecar.traces.assembler import AssembledTrace
from aurora_sgl.trace_format import (
    AUX,
    BITS,
    COMPACT,
    FULL,
    HEAD_TOKENS,
    LAST,
    PARTS,
    STEP_STARTS,
    TOKENS,
    TraceMetadata,
    is_compact,
)

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64", "uint8": "U8"}

#: Name -> dtype, shape, raw data.
Tensors = dict[str, tuple[str, tuple[int, ...], NDArray[Any]]]

Blob = bytes  # which is the name of a field of TraceRow

log = logging.getLogger(__name__)


class TraceRow(msgspec.Struct, array_like=True, frozen=True):
    """A row of ``trace`` on its way through the spool: its file exists when this is appended."""

    request_id: int
    uri: str
    bytes: int
    sha256: str
    created_us: int
    start: int
    end: int
    output_start: int
    prompt_sha256: str
    head_sha256: str
    greedy: bool
    aux_width: int
    last_width: int
    dtype: str
    tokens: Blob = b""  # int32, prompt and answer: which conversation it is a turn of
    prefix_sha256: str = ""  # of the tokens before ``start``; rows of older sidecars have none


def write_safetensors(file: BinaryIO, tensors: Tensors, metadata: dict[str, str]) -> str:
    """Write (dtype, shape, raw data) tensors; return the SHA-256 of the file.

    By hand because numpy has no bfloat16, and the sidecar need not load torch for it. Format:
    https://huggingface.co/docs/safetensors (little-endian header length, JSON header, data).
    """
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    parts = [struct.pack("<Q", len(text)), text]
    for part in parts:
        digest.update(part)
        file.write(part)
    for _, _, data in tensors.values():
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        digest.update(raw)
        file.write(raw)
    return digest.hexdigest()


def _compact(name: str, rows: NDArray[np.uint8], dtype: str) -> Tensors:
    """Raises ``ValueError`` for rows with numbers that are not finite."""
    small = compact_rows.compact(rows, dtype, BITS[name])
    parts = {part: getattr(small, part) for part in PARTS}
    return {f"{name}.{part}": (str(one.dtype), one.shape, one) for part, one in parts.items()}


class TraceWriter:
    """Puts traces under ``traces/<YYYYMMDD>/<request_id>.safetensors`` of the artifact root."""

    def __init__(self, artifacts: ArtifactRoot, scratch: Path, form: str = "full") -> None:
        """``form``: the setting ``capture_format``."""
        self._artifacts = artifacts
        self._scratch = scratch
        self._form = form
        self.dropped: Counter[str] = Counter()
        self.written = 0
        self.failing = False

    def write(self, trace: AssembledTrace, hello: wire.Hello | None) -> TraceRow | None:
        """Write one file. None when it couldn't be: one line in the log, and a count."""
        try:
            row = self._write(trace, hello)
        except ValueError as error:
            if not self.dropped["not_finite"]:
                log.warning(
                    "the trace of request %d is not kept (further ones are only counted): %s",
                    trace.header.request_id,
                    error,
                )
            self.dropped["not_finite"] += 1
            return None
        except (OSError, AuroraError) as error:
            if not self.failing:
                log.error("a trace can't be written (further ones are only counted): %s", error)
            self.failing = True
            self.dropped["disk"] += 1
            return None
        self.written += 1
        if self.failing:
            self.failing = False
            log.info("traces can be written again")
        return row

    def _write(self, trace: AssembledTrace, hello: wire.Hello | None) -> TraceRow:
        header = trace.header
        server = hello.server if hello else {}
        now = clock.utc_now()
        uri = f"traces/{now:%Y%m%d}/{header.request_id}.safetensors"
        widths = {AUX: header.aux_width, LAST: header.last_width}
        compact = is_compact(self._form, header.last_width)
        tensors: Tensors = {
            TOKENS: ("int64", trace.tokens.shape, trace.tokens),
            STEP_STARTS: ("int64", trace.step_starts.shape, trace.step_starts),
        }
        for name, rows in ((AUX, trace.aux), (LAST, trace.last)):
            if compact and widths[name]:
                tensors |= _compact(name, rows, header.dtype)
            elif widths[name]:
                tensors[name] = (header.dtype, (trace.rows, widths[name]), rows)
        metadata = TraceMetadata(
            header.request_id,
            header.output_start,
            header.greedy,
            trace.start,
            aux_layers=",".join(map(str, server.get("aux_layers") or ())),
            target_model=str(server.get("target_model", "")),
            format=COMPACT if compact else FULL,
            aux_width=widths[AUX],
            aux_bits=BITS[AUX] if compact else 0,
            last_width=widths[LAST],
            last_bits=BITS[LAST] if compact else 0,
        ).to_text()
        make_folder(self._scratch)
        prefix = f"{litter.mark()}."  # so that what a kill leaves can be swept
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix=prefix, suffix=".trace") as file:
            sha256 = write_safetensors(file, tensors, metadata)  # type: ignore[arg-type]
            file.flush()
            size = file.tell()
            self._artifacts.put_file(Path(file.name), uri)
        tokens = trace.tokens.tolist()
        return TraceRow(
            request_id=header.request_id,
            uri=uri,
            bytes=size,
            sha256=sha256,
            created_us=int(now.timestamp() * 1e6),
            start=trace.start,
            end=trace.start + trace.rows,
            output_start=header.output_start,
            prompt_sha256=sha256_ints(tokens[: header.output_start]),
            head_sha256=sha256_ints(tokens[:HEAD_TOKENS]),
            greedy=header.greedy,
            aux_width=header.aux_width,
            last_width=header.last_width,
            dtype=header.dtype,
            tokens=trace.tokens.astype(np.int32).tobytes(),
            prefix_sha256=sha256_ints(tokens[: trace.start]) if trace.start else "",
        )
