"""What several commands need: their common flags, and what their arguments name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aurora_sgl.console import print_json, print_table
from aurora_sgl.errors import printable

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from aurora_sgl.store.models import DeploymentGroup

#: A window of time takes whatever lies in it.
ALL = 1_000_000

Group = Annotated[str, typer.Option("--group", help="Deployment group (default: AURORA_GROUP).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
Version = Annotated[
    str, typer.Argument(help="An id, an alias (live, previous), or a hash's start.")
]


def open_store(*, writes: bool = False) -> Engine:
    """``writes``: refused at once where nothing can be written, for what begins with files."""
    from aurora_sgl import store
    from aurora_sgl.config import get_settings

    if writes:
        store.require_writable(get_settings().store_url)
    engine = store.connect()
    store.require_current(engine)
    return engine


def open_group(name: str, *, writes: bool = False) -> tuple[Engine, DeploymentGroup]:
    from aurora_sgl import store
    from aurora_sgl.config import get_settings
    from aurora_sgl.store import queries

    engine = open_store(writes=writes)
    with store.session(engine, write=False) as s:
        return engine, queries.groups.group_by_name(s, name or get_settings().group)


def version_id(engine: Engine, group: str, name: str) -> int:
    from aurora_sgl.rollout.versions import resolve_version

    return resolve_version(engine, group, name)


def target_of(group: DeploymentGroup) -> Any:
    """The target's shape, when its folder is on this machine."""
    from aurora_sgl.drafter import hub
    from aurora_sgl.drafter.target import read_target

    folder = hub.local(group.target_model, revision=group.target_revision or None)
    if not (folder / "config.json").exists():
        return None
    return read_target(folder, model=group.target_model, revision=group.target_revision)


def read_recipe(pairs: list[str], **given: Any) -> Any:
    """Training settings from NAME=VALUE pairs, and from flags that were given (others are
    ``None``); exit code 2 for what is none."""
    from pydantic import ValidationError

    from aurora_sgl.training.settings import TrainSettings

    if not all("=" in pair for pair in pairs):
        raise typer.BadParameter("expected NAME=VALUE", param_hint="--set")
    try:
        chosen = {name: value for name, value in given.items() if value is not None}
        return TrainSettings.model_validate(dict(pair.split("=", 1) for pair in pairs) | chosen)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise typer.BadParameter(f"{where}: {first['msg']}", param_hint="--set") from None


def read_choices(pairs: list[str]) -> dict[str, Any]:
    """Those settings alone that ``pairs`` of ``NAME=VALUE`` name, checked as :func:`read_recipe`
    does."""
    if not pairs:
        return {}
    checked = read_recipe(pairs).as_json()
    return {name: checked[name] for name in (pair.partition("=")[0] for pair in pairs)}


def read_window(text: str) -> dict[str, Any]:
    """``400``: requests; ``90m``, ``6h``, ``2d``: time. Exit code 2 for anything else."""
    if not text:
        return {}
    hours = {"m": 1 / 60, "h": 1.0, "d": 24.0}.get(text[-1])
    try:
        if hours is None:
            return {"window": int(text)}
        return {"window": ALL, "window_hours": float(text[:-1]) * hours}
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a number of requests nor a time such as 90m, 6h or 2d",
            param_hint="--window",
        ) from None


def kept(text: str) -> str:
    """A reason or a name as it is kept: of bytes that a shell passes on and no database takes,
    what can be read, on one line."""
    return printable(" ".join(text.split()))


def user() -> str:
    """Who acts, for the audit. A container may run under a number that has no name."""
    import getpass
    import os
    import socket

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def moment(text: str, option: str, since: datetime | None = None) -> datetime:
    """Of a date or time as people write it, without a zone in UTC; with ``since`` also ``90m``,
    ``6h`` or ``2d`` from there."""
    if since is not None and text[:-1].isdecimal() and text[-1] in "mhd" and len(text) < 8:
        return since + int(text[:-1]) * timedelta(hours={"m": 1 / 60, "h": 1, "d": 24}[text[-1]])
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no date or time such as 2026-11-24 or 2026-11-24T10:30",
            param_hint=option,
        ) from None
    return read if read.tzinfo else read.replace(tzinfo=UTC)


def columns_of(row: Any) -> dict[str, Any]:
    """The columns of a table's row."""
    return {column.name: getattr(row, column.name) for column in row.__table__.columns}


def print_rows(
    title: str, columns: dict[str, str], rows: list[dict[str, Any]], as_json: bool
) -> None:
    if as_json:
        print_json(rows)
    else:
        print_table(title, columns, rows)
