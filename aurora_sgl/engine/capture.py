"""Hidden states of served requests, for training: the drafter's inputs and the target's last state.

The auxiliary states are what SGLang itself hands to the drafter. The last state is what enters the
logits processor; a hook keeps a reference. Under CUDA graphs Python does not run at replay, so
there the hook copies into a fixed buffer while the graph is captured, and every replay fills it.
"""

from __future__ import annotations

from typing import Any

import torch

from aurora_sgl import wire
from aurora_sgl.engine.channel import Channel
from aurora_sgl.engine.draft_tree import VerifyObservation
from aurora_sgl.engine.request_state import RequestState, visible_length

_ROWS_PER_MESSAGE = 32


class LastHiddenState:
    """The target's final hidden states of the latest forward, [rows, hidden].

    One for each logits processor; a hook on the class hands it what every one of them is given,
    because graphs are captured before there is a request that could tell which is the target's.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._rows: torch.Tensor | None = None
        self._graph_buffer: torch.Tensor | None = None

    @classmethod
    def of(cls, logits_processor: Any) -> LastHiddenState:
        """The one of a logits processor, which keeps its rows from now on."""
        last_hidden = _kept_by(logits_processor)
        last_hidden.wanted = True
        return last_hidden

    def see(self, hidden_states: torch.Tensor, *, verifies: bool) -> None:
        """``hidden_states`` is what a forward ends with; ``verifies``: a target over drafts."""
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            if verifies:  # the only graphs that rows are taken from
                self._into_graph_buffer(hidden_states)
        elif self.wanted:
            self._rows = hidden_states

    def _into_graph_buffer(self, hidden_states: torch.Tensor) -> None:
        rows = hidden_states.shape[0]
        if self._graph_buffer is None or self._graph_buffer.shape[0] < rows:
            # SGLang captures the largest batch first; smaller graphs share its buffer.
            self._graph_buffer = torch.empty_like(hidden_states)
        self._graph_buffer[:rows].copy_(hidden_states)

    def take(self, rows: int, *, from_graph: bool = False) -> torch.Tensor | None:
        """The first ``rows`` rows of the latest forward, or None when it had fewer.

        ``from_graph``: it was the replay of a graph, which fills the buffer but runs no Python.
        """
        kept = self._graph_buffer if from_graph else self._rows
        if kept is None or kept.shape[0] < rows:
            return None
        return kept[:rows]


def _kept_by(logits_processor: Any) -> LastHiddenState:
    last_hidden: LastHiddenState | None = getattr(logits_processor, "_aurora_last", None)
    if last_hidden is None:
        last_hidden = logits_processor._aurora_last = LastHiddenState()
    return last_hidden


def keep_last(logits_processor: Any, hidden_states: Any, metadata: Any) -> None:
    """Before a logits processor's forward; ``metadata`` says which kind of forward it ends."""
    if not isinstance(hidden_states, torch.Tensor):
        return
    mode = getattr(metadata, "forward_mode", None)
    verifies = mode is not None and bool(mode.is_target_verify())
    _kept_by(logits_processor).see(hidden_states, verifies=verifies)


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
        """Rows of the accepted path of one verify step: the root and the accepted drafts, as far
        as the client gets them (a step may go on past a stop)."""
        assert observation.aux is not None
        accept_len = max(0, min(accept_len, visible_length(req) - before + 1))
        first = row * observation.shape.nodes
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
