"""What the demo shows while it runs: progress, the phase, and a table of versions.

On a terminal one live picture; elsewhere, and with ``--json``, plain lines on stderr.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


@dataclass
class VersionRow:
    """One version as the table shows it."""

    id: int
    origin: str
    replayed: str = "-"
    verdict: str = "-"
    served: int = 0
    accept_length: str = "-"
    live: bool = False


@dataclass
class Screen:
    """Everything that is on the screen; the demo writes the fields, the screen draws them."""

    quiet: bool = False
    url: str = ""
    phase: str = ""
    versions: list[VersionRow] = field(default_factory=list)
    speeds: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._console = Console(stderr=True)
        self._fancy = self._console.is_terminal and not self.quiet
        self._progress = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._live: Live | None = None
        self._tasks: dict[str, Any] = {}
        self._line_times: dict[str, float] = {}
        self._begun = time.monotonic()

    def __enter__(self) -> Screen:
        if self._fancy:
            self._live = Live(
                get_renderable=self._draw, console=self._console, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._fancy:
            self._console.print(line, highlight=False)
        else:
            elapsed = time.monotonic() - self._begun
            print(f"[{elapsed:6.1f} s] {line}", file=sys.stderr, flush=True)

    def bar(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """Move a progress bar; it appears when it is first named."""
        if self._fancy:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total, note="")
            self._progress.update(self._tasks[name], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if done == total or now - self._line_times.get(name, 0.0) >= 10.0:
            self._line_times[name] = now
            self.say(f"{name}: {done}{f'/{total}' if total else ''} {note}".rstrip())

    def end_bar(self, name: str) -> None:
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))
        self._line_times.pop(name, None)

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self.url:
            parts.append(Text(f"OpenAI endpoint: {self.url}/v1   (Ctrl-C ends everything)"))
        if self.phase:
            parts.append(Text(f"Speculation: {self.phase}"))
        if self.speeds:
            shown = "   ".join(f"{name} {value}" for name, value in self.speeds.items())
            parts.append(Text(f"Tokens/s on the held-out prompts: {shown}"))
        if self.versions:
            parts.append(self.table())
        if self._tasks:
            parts.append(self._progress)
        return Group(*parts)

    def table(self) -> Table:
        """Versions, the live one marked."""
        table = Table(title="Drafter versions", title_justify="left", header_style="bold")
        for heading in ("version", "made from", "replayed", "verdict", "requests", "accept length"):
            left = heading in ("made from", "verdict")
            table.add_column(heading, justify="left" if left else "right")
        for row in self.versions:
            name = f"{row.id} live" if row.live else str(row.id)
            table.add_row(
                name,
                row.origin,
                row.replayed,
                row.verdict,
                str(row.served),
                row.accept_length,
                style="bold green" if row.live else "",
            )
        return table

    def print_table(self) -> None:
        if self.versions and not self.quiet:
            self._console.print(self.table())
