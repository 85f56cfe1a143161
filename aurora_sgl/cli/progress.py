"""Progress bars of commands that take a while; on stderr, so that --json stays clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def training_progress(*, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar over the updates of a run; takes the events that ``training.run.train_once`` tells."""
    with _bar(quiet) as bar:
        task = bar.add_task("reading requests", total=None)

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "window":
                bar.update(task, description=f"training on {event['requests']} requests")
            elif event["event"] == "update":
                text = f"pass {event['pass']}/{event['passes']}, loss {event['loss']:.3f}"
                bar.update(
                    task, description=text, completed=event["update"], total=event["updates"]
                )
            elif event["event"] == "line_search":
                text = "choosing how far to go by replay of the dev split"
                bar.update(task, description=text, completed=event["done"], total=event["of"])
            elif event["event"] == "second_look":
                text = f"judging the last candidate by {event['requests']} requests since"
                bar.update(task, description=text, completed=event["done"], total=event["requests"])
            elif event["event"] == "reading":
                bar.update(task, description="reading requests", completed=0, total=None)
            elif event["event"] == "gate":
                text = f"replaying {event['requests']} held-out requests"
                bar.update(task, description=text, completed=event["done"], total=event["requests"])
            elif event["event"] == "storing":
                bar.update(task, description="storing the version")

        yield show


@contextmanager
def counted_progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told (done, all)."""
    with _bar(quiet) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(quiet: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=quiet)
