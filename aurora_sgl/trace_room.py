"""What the budgets of traces hold for the target that a server runs, in tokens and in requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class TraceRoom:
    """Budgets in bytes as a server says them, and what a token takes of them."""

    row_bytes: int
    disk_bytes: int
    unfinished_bytes: int
    bytes_per_second: int
    #: Mean of the traces in the store; 0: there are none.
    request_bytes: float = 0.0
    #: Of a token in a file, where rows may be compact; 0: as much as on its way there.
    file_row_bytes: int = 0

    @classmethod
    def of(cls, counters: Mapping[str, float], request_bytes: float = 0.0) -> TraceRoom | None:
        """From the counters of a heartbeat (see ``engine.capture``); None: it captures nothing."""
        row_bytes = int(counters.get("trace_row_bytes", 0))
        if row_bytes <= 0:
            return None
        return cls(
            row_bytes,
            disk_bytes=int(counters.get("trace_budget_disk", 0)),
            unfinished_bytes=int(counters.get("trace_budget_unfinished", 0)),
            bytes_per_second=int(counters.get("trace_budget_second", 0)),
            request_bytes=request_bytes,
            file_row_bytes=int(counters.get("trace_file_row_bytes", 0)),
        )

    @property
    def disk_requests(self) -> int | None:
        """None: no request was traced yet, so that their length is not known."""
        return int(self.disk_bytes / self.request_bytes) if self.request_bytes else None

    def sentence(self) -> str:
        """What fits, for people."""
        requests = self.disk_requests
        in_files = self.file_row_bytes or self.row_bytes
        compact = in_files != self.row_bytes
        return (
            f"a token takes {self.row_bytes / 1024:,.1f} KiB"
            + (f", {in_files / 1024:,.1f} KiB in files" if compact else "")
            + f": the files hold {self.disk_bytes // in_files:,} tokens"
            + (f" (about {requests:,} requests)" if requests is not None else "")
            + f", unfinished traces {self._fits(self.unfinished_bytes)}, "
            f"a second {self._fits(self.bytes_per_second)}"
        )

    def _fits(self, budget: int) -> str:
        return f"{budget // self.row_bytes:,} tokens"

    def too_small_for(self, requests: int) -> str:
        """What is wrong when training begins only after so many new requests; "" when nothing is.
        ``requests``: 0 for a server that does not train by their number."""
        room = self.disk_requests
        if room is None or not requests or room >= requests:
            return ""
        return (
            f"training begins after {requests:,} new requests, and the trace files' budget of "
            f"{self.disk_bytes / MIB:,.0f} MiB holds about {room:,} of them"
        )


ADVICE = "raise trace_bytes (aurora-sgl db limits), or lower AURORA_SCHEDULER_REQUESTS"
