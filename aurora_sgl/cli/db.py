"""db upgrade, current, prune and limits; doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_sgl.cli.rollout import Actor
from aurora_sgl.cli.shared import AsJson, DryRun, Group, kept, print_rows
from aurora_sgl.console import print_json

db_app = typer.Typer(help="The store: its schema and how much it keeps.")


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Upgrade the store's schema to what this release needs. In PostgreSQL make the partitions of
    the next days, and drop old ones that are empty."""
    from aurora_sgl import store
    from aurora_sgl.store.partitions import BY_HAND, ensure_partitions
    from aurora_sgl.store.retention import drop_emptied

    engine = store.connect()
    revision = store.upgrade(engine)
    ensure_partitions(engine, ahead=BY_HAND, at_once=True)
    drop_emptied(engine)
    print(revision)


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
    keep_versions: Annotated[
        int | None, typer.Option(min=0, help="Newest versions to keep.")
    ] = None,
    group: Annotated[str, typer.Option("--group", help="Deployment group (default: each).")] = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete now what the limits of each group in the store allow (see db limits)."""
    from aurora_sgl.cli.retention import prune_groups

    chosen = {"event_days": days, "trace_bytes": trace_bytes, "versions": keep_versions}
    values = {name: value for name, value in chosen.items() if value is not None}
    prune_groups(group, values, with_weights=weights, dry_run=dry_run, as_json=as_json)


@db_app.command("limits")
def db_limits(
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=NUMBER, such as trace_bytes=20GiB.")
    ] = None,
    reason: Annotated[str, typer.Option(callback=kept, help="Why; goes into the audit.")] = "",
    group: Group = "",
    actor: Actor = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Show how much a group keeps, or change it."""
    from aurora_sgl.cli.retention import change_limits, show_limits

    if changes:
        change_limits(group, changes, actor, reason, dry_run=dry_run, as_json=as_json)
    else:
        show_limits(group, as_json=as_json)


def doctor(as_json: AsJson = False) -> None:
    """Check this machine; exit code 1 when something that is needed is missing."""
    from aurora_sgl.doctor import examine

    findings = examine()
    columns = {"what": "name", "state": "state", "found": "found", "to do": "advice"}
    print_rows("aurora-sgl doctor", columns, [vars(each) for each in findings], as_json)
    raise typer.Exit(1 if any(each.state == "missing" for each in findings) else 0)
