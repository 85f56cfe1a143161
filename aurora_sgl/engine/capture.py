"""Hidden states of served requests, for training: the drafter's inputs and the target's last state.

The auxiliary states are what SGLang itself hands to the drafter. The last state is what enters the
logits processor; a wrapper keeps a reference. Under CUDA graphs Python does not run at replay, so
there the wrapper copies into a fixed buffer while the graph is captured, and every replay fills it.
"""

from __future__ import annotations

from typing import Any

import torch

from aurora_sgl import wire
from aurora_sgl.engine.channel import Channel
from aurora_sgl.engine.recorder import RequestState, VerifyObservation, visible_length

_ROWS_PER_MESSAGE = 32


class LastHiddenState:
    """Keeps the target's final hidden states of the latest forward, [rows, hidden]."""

    def __init__(self, logits_processor: Any) -> None:
        self._rows: torch.Tensor | None = None
        self._graph_buffer: torch.Tensor | None = None
        self._original = logits_processor.forward
        logits_processor.forward = self._forward

    def _forward(self, input_ids: Any, hidden_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            self._rows = self._into_graph_buffer(hidden_states)
        else:
            self._rows = hidden_states
        return self._original(input_ids, hidden_states, *args, **kw)

    def _into_graph_buffer(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.shape[0]
        if self._graph_buffer is None or self._graph_buffer.shape[0] < rows:
            # SGLang captures the largest batch first; smaller graphs share its buffer.
            self._graph_buffer = torch.empty_like(hidden_states)
        self._graph_buffer[:rows].copy_(hidden_states)
        return self._graph_buffer

    def take(self, rows: int) -> torch.Tensor | None:
        """The first ``rows`` rows, or None when the latest forward had fewer."""
        if self._rows is None or self._rows.shape[0] < rows:
            return None
        return self._rows[:rows]


def _as_bytes(rows: torch.Tensor) -> bytes:
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


class Capture:
    """Collects rows per request and sends them to the sidecar in pieces."""

    def __init__(self, channel: Channel, boot_id: int) -> None:
        self._channel = channel
        self._boot_id = boot_id
        self._dtype, self._aux_width, self._last_width = "", 0, 0  # set by the first prefill

    def learn_layout(self, aux: torch.Tensor, last: torch.Tensor | None) -> None:
        """Take dtype and widths from the rows of a prefill; they stay the same for a boot."""
        self._dtype = str(aux.dtype).removeprefix("torch.")
        self._aux_width = aux.shape[-1]
        self._last_width = last.shape[-1] if last is not None else 0

    def _header(
        self,
        state: RequestState,
        req: Any,
        start: int,
        tokens: list[int],
        *,
        final: bool = False,
        steps: list[int] | None = None,
    ) -> wire.TraceHeader:
        return wire.TraceHeader(
            boot_id=self._boot_id,
            request_id=state.request_id,
            start=start,
            tokens=tokens,
            dtype=self._dtype,
            aux_width=self._aux_width,
            last_width=self._last_width,
            final=final,
            output_start=len(req.origin_input_ids),
            greedy=state.greedy,
            step_starts=steps or [],
        )

    def begin(self, req: Any, state: RequestState) -> None:
        """Send the whole prompt's tokens: a cached prefix has no rows, but training needs it."""
        tokens = list(req.origin_input_ids)
        header = self._header(state, req, 0, tokens)
        state.trace_broken = not self._channel.send_trace(header, b"", b"")

    def prompt_rows(
        self,
        req: Any,
        state: RequestState,
        start: int,
        aux: torch.Tensor,  # [rows, width] on CPU
        last: torch.Tensor | None,  # [rows, hidden] on CPU
    ) -> None:
        """Rows of one prefill chunk, at absolute positions from ``start``."""
        tokens = [*req.origin_input_ids, *req.output_ids][start : start + aux.shape[0]]
        self._add(req, state, start, tokens, aux, last)

    def verify_rows(
        self,
        req: Any,
        state: RequestState,
        row: int,
        before: int,  # visible output tokens before the step
        accept_len: int,
        observation: VerifyObservation,
    ) -> None:
        """Rows of the accepted path of one verify step: the root and the accepted drafts."""
        assert observation.aux is not None
        first = row * observation.nodes
        aux = observation.aux[first : first + accept_len]
        last = None
        if observation.last is not None:
            path = observation.accept_index[row, :accept_len].to(torch.int64)
            last = observation.last[path]
        root = len(req.origin_input_ids) + before - 1
        sequence = list(req.output_ids[before - 1 : before - 1 + accept_len])
        state.step_starts.append(root)
        self._add(req, state, root, sequence, aux, last)

    def _add(
        self,
        req: Any,
        state: RequestState,
        start: int,
        tokens: list[int],
        aux: torch.Tensor,
        last: torch.Tensor | None,
    ) -> None:
        if state.trace_broken or aux.shape[0] == 0:
            return
        held = state.trace_rows
        if held and held[-1][0] + len(held[-1][1]) != start:
            self._send(req, state)
        held.append((start, tokens, aux, last))
        state.trace_pending += len(tokens)
        if state.trace_pending >= _ROWS_PER_MESSAGE:
            self._send(req, state)

    def _send(self, req: Any, state: RequestState) -> None:
        held = state.trace_rows
        if not held:
            return
        tokens = [token for piece in held for token in piece[1]]
        aux = torch.cat([piece[2][: len(piece[1])] for piece in held])
        lasts = [piece[3][: len(piece[1])] for piece in held if piece[3] is not None]
        last = torch.cat(lasts) if len(lasts) == len(held) else None
        header = self._header(state, req, held[0][0], tokens, steps=list(state.step_starts))
        state.trace_broken |= not self._channel.send_trace(
            header, _as_bytes(aux), _as_bytes(last) if last is not None else b""
        )
        held.clear()
        state.step_starts.clear()
        state.trace_pending = 0

    def end(self, req: Any, state: RequestState) -> None:
        """Send what is left, and the tokens of the whole answer."""
        self._send(req, state)
        if state.trace_broken:
            return
        start = len(req.origin_input_ids)
        tokens = list(req.output_ids[: visible_length(req)])
        header = self._header(state, req, start, tokens, final=True)
        self._channel.send_trace(header, b"", b"")
