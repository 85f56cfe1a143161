"""Hidden states of served requests, for training: the drafter's inputs and the target's last state.

The auxiliary states are what SGLang itself hands to the drafter. The last state is what enters the
logits processor; a hook keeps a reference. Under CUDA graphs Python does not run at replay, so
there the hook copies into a fixed buffer while the graph is captured, and every replay fills it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from aurora_sgl import wire
from aurora_sgl.config import Settings
from aurora_sgl.engine.copier import Copier
from aurora_sgl.engine.draft_tree import StepRows
from aurora_sgl.engine.forward_rows import ForwardRows, GivenUp, Layout, Span, Tokens
from aurora_sgl.engine.request_state import RequestState, visible_length
from aurora_sgl.engine.trace_budget import UNKNOWN_ROW, OpenTrace, TraceBudget
from aurora_sgl.trace_format import file_row_bytes


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


class Capture:
    """What the scheduler's thread does about traces: it chooses them and keeps references.

    Nothing here copies rows; see ``copier``.
    """

    def __init__(self, budget: TraceBudget, copier: Copier, *, most_held: int) -> None:
        """``most_held``: bytes of SGLang's tensors that may wait to be copied."""
        self.budget = budget
        self.copier = copier
        self.dropped: Counter[str] = Counter()  # traces that began and don't reach the sidecar
        self.disk_bytes = 0  # the sidecar's budget of files, which is only told, and how it
        self.form = "full"  # writes rows
        self._most_held = most_held
        self._layout: Layout | None = None  # set by the first prefill
        self._open: dict[int, OpenTrace] = {}

    @classmethod
    def of(
        cls,
        settings: Settings,
        send: Callable[[wire.TraceBatch], bool],
        boot_id: int,
        row_bytes: int,
    ) -> Capture:
        """As the settings say. ``row_bytes``: of a token's hidden states; 0: not known yet."""
        budget = TraceBudget(
            row_bytes or UNKNOWN_ROW,
            request_bytes=settings.capture_request_bytes,
            total_bytes=settings.trace_memory_bytes,
            bytes_per_second=settings.capture_bytes_per_second,
        )
        copier = Copier(send, boot_id, settings.capture_ring_bytes)
        capture = cls(budget, copier, most_held=settings.capture_backlog_bytes)
        capture.disk_bytes, capture.form = settings.capture_bytes, settings.capture_format
        return capture

    def learn_layout(self, aux: torch.Tensor, last: torch.Tensor | None) -> None:
        """Take dtype and widths from the rows of a prefill; they stay the same for a boot."""
        widths = (aux.shape[-1], last.shape[-1] if last is not None else 0)
        old = self._layout
        if old is None or (old.aux_width, old.last_width) != widths:
            dtype = str(aux.dtype).removeprefix("torch.")
            self._layout = Layout(dtype, *widths, aux.element_size())
            self.budget.row_bytes = self._layout.row_bytes

    # -- choosing --------------------------------------------------------------------------------

    def choose(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """A ticket for a request whose whole trace fits the budgets, 0 for another."""
        self.budget.settle(self.copier.freed)
        if self.copier.is_behind():
            self.budget.refused["behind"] += 1
            return 0
        return self.budget.choose(prompt_tokens, max_new_tokens, self.copier.waiting)

    def begin(self, req: Any, state: RequestState, ticket: int) -> None:
        """Send the whole prompt's tokens: a cached prefix has no rows, but training needs it."""
        begun = time.perf_counter()
        prompt = req.origin_input_ids
        reserved = self.budget.begin(ticket, len(prompt)) if self._layout is not None else 0
        if not reserved or self._layout is None:
            return
        trace = OpenTrace(state.request_id, len(prompt), state.greedy, reserved)
        state.trace = self._open[trace.request_id] = trace
        self.copier.put(Tokens(self._layout, trace, 0, prompt[:]))
        self.budget.spent(time.perf_counter() - begun)

    # -- rows ------------------------------------------------------------------------------------

    def gather(self, aux: torch.Tensor | None, last: torch.Tensor | None) -> Gathered:
        """What is to become one item: the rows of one forward."""
        if aux is None or self._layout is None or aux.shape[-1] != self._layout.aux_width:
            return Gathered(None)
        if self._layout.last_width and last is None:
            return Gathered(None)
        return Gathered(ForwardRows(self._layout, aux, last))

    def prompt_rows(
        self, gathered: Gathered, req: Any, state: RequestState, start: int, first: int, count: int
    ) -> None:
        """``count`` rows from row ``first`` of a prefill, at absolute positions from ``start``."""
        begun = time.perf_counter()
        part = range(first, first + count)
        self._add(gathered, state, start, _tokens(req, start, count), part)
        self.budget.spent(time.perf_counter() - begun)

    def step_rows(
        self,
        gathered: Gathered,
        tracked: Iterable[tuple[int, Any, RequestState, int]],
        step: StepRows,
    ) -> None:
        """Rows of the accepted paths of one verify step: the root and the accepted drafts, as far
        as the client gets them (a step may go on past a stop).

        ``tracked``: (row of the batch, request, state, visible output tokens before the step).
        One loop without calls: it runs for each request of each step.
        """
        begun = time.perf_counter()
        rows, accept_lens = gathered.rows, step.accept_lens
        marks = rows.marks if rows is not None else []
        row_bytes = self.budget.bytes_of(1)
        for row, req, state, before in tracked:
            trace = state.trace
            if trace is None or trace.broken:
                continue
            output, visible = req.output_ids, req.finished_len  # see visible_length
            if visible is None:
                visible = len(output)
            count = min(accept_lens[row], visible - before + 1)
            if count <= 0 or before < 1:
                continue
            used = trace.used + count * row_bytes
            if rows is None:
                self._give_up(trace, "no_rows")
            elif used > trace.reserved and not self.budget.grow(trace, count * row_bytes):
                self._give_up(trace, "outgrown")
            else:
                trace.used = used
                root = before - 1
                tokens = output[root : root + count]
                marks.append((trace, row, trace.output_start + root, tokens))
        if rows is not None:
            rows.step = step
        self.budget.spent(time.perf_counter() - begun)

    def _add(
        self,
        gathered: Gathered,
        state: RequestState,
        start: int,
        tokens: Sequence[int],
        part: range,
    ) -> None:
        trace, count = state.trace, len(tokens)
        if trace is None or trace.broken or not count:
            return
        if gathered.rows is None:
            self._give_up(trace, "no_rows")
        elif not self.budget.grow(trace, self.budget.bytes_of(count)):
            self._give_up(trace, "outgrown")
        else:
            part = part[:count]
            gathered.rows.spans.append(Span(trace, start, tokens, part, part, False))

    def hand_over(self, gathered: Gathered) -> None:
        """Give what was gathered to the copier, and after it the ends of requests."""
        begun = time.perf_counter()
        rows = gathered.rows
        if rows is not None and (rows.spans or rows.marks):
            held = rows.held
            if self.copier.held + held <= self._most_held:
                self.copier.put(rows, held)
            else:
                for trace in rows.traces:
                    self._give_up(trace, "backlog")
        for state, answer in gathered.ends:
            self._end(state, answer)
        self.budget.spent(time.perf_counter() - begun)

    def end(self, gathered: Gathered, req: Any, state: RequestState) -> None:
        """A request ended: the tokens of the whole answer follow its last rows."""
        length = visible_length(req)
        self.budget.answered(length)
        if state.trace is not None:
            gathered.ends.append((state, req.output_ids[:length]))

    def _end(self, state: RequestState, answer: Sequence[int]) -> None:
        trace, state.trace = state.trace, None
        if trace is None:
            return
        self._open.pop(trace.request_id, None)
        if trace.broken or self._layout is None:
            self.copier.put(GivenUp(trace))
        else:
            self.copier.put(Tokens(self._layout, trace, trace.output_start, answer, final=True))
        self.budget.close(trace)

    def let_go(self, request_id: int, reason: str) -> None:
        """Forget a request that goes on without us, or that SGLang forgot."""
        trace = self._open.pop(request_id, None)
        if trace is not None:
            self._give_up(trace, reason)
            self.budget.close(trace)

    def _give_up(self, trace: OpenTrace, reason: str) -> None:
        if not trace.broken:
            trace.broken = True
            self.dropped[reason] += 1
        self.copier.put(GivenUp(trace))

    @property
    def _file_row_bytes(self) -> int:
        layout = self._layout
        if layout is None:
            return self.budget.row_bytes
        return file_row_bytes(layout.aux_width, layout.last_width, layout.item_bytes, self.form)

    # -- what is told ----------------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        """Traces admitted, refused and dropped, by reason, and bytes that are taken."""
        self.budget.settle(self.copier.freed)
        dropped = self.dropped + Counter(dict(self.copier.dropped))
        refused = self.budget.refused
        return {
            "dropped_traces": float(dropped.total()),
            "traces_admitted": float(self.budget.admitted),
            "traces_refused": float(refused.total()),
            "trace_bytes_reserved": float(self.budget.reserved),
            "trace_bytes_held": float(self.copier.held),
            "trace_row_bytes": float(self.budget.row_bytes),
            "trace_file_row_bytes": float(self._file_row_bytes),
            "trace_budget_disk": float(self.disk_bytes),
            "trace_budget_unfinished": float(self.budget.total_bytes),
            "trace_budget_second": float(self.budget.bytes_per_second),
            "capture_scale": self.budget.scale,
            **{f"traces_refused_{reason}": float(count) for reason, count in refused.items()},
            **{f"traces_dropped_{reason}": float(count) for reason, count in dropped.items()},
        }


@dataclass(slots=True)
class Gathered:
    """Rows of one forward, and the requests that end with it."""

    rows: ForwardRows | None
    ends: list[tuple[RequestState, Sequence[int]]] = field(default_factory=list)


def _tokens(req: Any, start: int, count: int) -> Sequence[int]:
    """The input tokens of a request at ``count`` positions from ``start``."""
    prompt: Sequence[int] = req.origin_input_ids
    tokens = prompt[start : start + count]
    if start + count <= len(prompt):
        return tokens
    first = max(0, start - len(prompt))
    return [*tokens, *req.output_ids[first : start + count - len(prompt)]]
