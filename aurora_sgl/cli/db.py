"""db upgrade, current and prune; doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_sgl.cli.shared import AsJson, DryRun, open_store, print_rows
from aurora_sgl.console import print_json, print_table

db_app = typer.Typer(help="The store: its schema and how much it keeps.")


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Upgrade the store's schema to what this release needs, and in PostgreSQL make the partitions
    of the next days."""
    from aurora_sgl import store
    from aurora_sgl.store.partitions import BY_HAND, ensure_partitions

    engine = store.connect()
    print(store.upgrade(engine))
    ensure_partitions(engine, ahead=BY_HAND, at_once=True)


@db_app.command("current")
def db_current(as_json: AsJson = False) -> None:
    """Show the store's schema version and the one that this release needs."""
    from aurora_sgl import store

    revision, needed = store.current(store.connect()), store.head()
    if as_json:
        print_json({"current": revision, "needed": needed, "up_to_date": revision == needed})
    else:
        print(f"{revision or 'none'} (needed: {needed})")
    raise typer.Exit(0 if revision == needed else 1)


@db_app.command("prune")
def db_prune(
    days: Annotated[int | None, typer.Option(min=1, help="Days of events to keep.")] = None,
    trace_bytes: Annotated[int | None, typer.Option(min=0, help="Bytes of traces to keep.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Delete unused weights too.")] = False,
    keep_versions: Annotated[int, typer.Option(min=0, help="Newest versions to keep.")] = 10,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete old events, traces beyond their budget and, if asked for, unused weights."""
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.config import get_settings
    from aurora_sgl.store.retention import prune

    settings = get_settings()
    report = prune(
        open_store(),
        ArtifactRoot(),
        days=settings.retention_days if days is None else days,
        trace_bytes=settings.capture_bytes if trace_bytes is None else trace_bytes,
        weights=weights,
        keep_versions=keep_versions,
        dry_run=dry_run,
    )
    if as_json:
        print_json(report)
        return
    rows = [{"name": name, "value": value} for name, value in vars(report).items()]
    print_table("would go" if dry_run else "gone", {"": "name", " ": "value"}, rows)


def doctor(as_json: AsJson = False) -> None:
    """Check this machine; exit code 1 when something that is needed is missing."""
    from aurora_sgl.doctor import examine

    findings = examine()
    columns = {"what": "name", "state": "state", "found": "found", "to do": "advice"}
    print_rows("aurora-sgl doctor", columns, [vars(each) for each in findings], as_json)
    raise typer.Exit(1 if any(each.state == "missing" for each in findings) else 0)
