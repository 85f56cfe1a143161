"""Trace files: the tokens and the target's features of one request (safetensors)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from aurora_sgl import compact_rows
from aurora_sgl.errors import AuroraError
from aurora_sgl.trace_format import (
    AUX,
    COMPACT,
    LAST,
    PARTS,
    TOKENS,
    TraceMetadata,
    UnknownFormatError,
)

_FEATURES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class TraceFeatures:
    """Features of positions ``start .. start + len(aux) - 1`` of one sequence."""

    request_id: int
    tokens: torch.Tensor  # [T] int64, from position 0
    aux: torch.Tensor  # [n, aux_width]
    last: torch.Tensor  # [n, H]
    start: int
    output_start: int
    greedy: bool

    @property
    def end(self) -> int:
        return self.start + len(self.aux)


def read_trace(path: Path, *, start: int = 0) -> TraceFeatures:
    """A whole trace file; compact rows come as bfloat16. Raises ``AuroraError`` when it is missing,
    cut short, inconsistent or of a later format."""
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = TraceMetadata.from_text(file.metadata() or {})
            trace = TraceFeatures(
                request_id=meta.request_id,
                tokens=file.get_tensor(TOKENS).to(torch.int64),
                aux=_rows(file, AUX, meta),
                last=_rows(file, LAST, meta),
                start=start,
                output_start=meta.output_start,
                greedy=meta.greedy,
            )
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    except UnknownFormatError as error:
        raise AuroraError(
            f"trace {path.name} is of format {error}, and this version reads 1 and 2: it was "
            "written by a newer one"
        ) from None
    except (KeyError, ValueError) as error:
        raise AuroraError(f"trace {path.name} lacks {error}") from None
    if (trace.tokens.dim(), trace.aux.dim(), trace.last.dim()) != (1, 2, 2):
        raise AuroraError(f"trace {path.name} holds tensors of other shapes than a trace's")
    if trace.aux.dtype not in _FEATURES or trace.last.dtype not in _FEATURES:
        raise AuroraError(f"trace {path.name} holds features that are no numbers of 16 bits up")
    if len(trace.aux) != len(trace.last) or trace.end > len(trace.tokens):
        raise AuroraError(f"trace {path.name} holds more features than tokens")
    if not 0 <= trace.output_start <= len(trace.tokens):
        raise AuroraError(f"trace {path.name} has no place where its output begins")
    return trace


def _rows(file: Any, name: str, meta: TraceMetadata) -> torch.Tensor:  # shape: [n, width]
    """Raises ``ValueError`` for compact parts that don't belong together."""
    if meta.format != COMPACT:
        rows: torch.Tensor = file.get_tensor(name)
        return rows
    packed, codes, largest, channels = (file.get_tensor(f"{name}.{part}").numpy() for part in PARTS)
    bits, width = getattr(meta, f"{name}_bits"), getattr(meta, f"{name}_width")
    small = compact_rows.CompactRows(packed, codes, largest, channels, bits, width)
    return torch.from_numpy(compact_rows.numbers(small)).to(torch.bfloat16)


def read_tokens(path: Path) -> torch.Tensor:  # [T] int64
    """Only the tokens of a trace file. Raises ``AuroraError`` as :func:`read_trace` does."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tokens: torch.Tensor = file.get_tensor(TOKENS).to(torch.int64)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    if tokens.dim() != 1:
        raise AuroraError(f"trace {path.name} holds tokens that are no list")
    return tokens


def _unreadable(path: Path, error: Exception) -> AuroraError:
    why = (str(error) or type(error).__name__).splitlines()[0]
    return AuroraError(f"trace {path.name} is missing or cut short: {why}")
