"""alerts and notify."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aurora_sgl.cli.rollout import Actor
from aurora_sgl.cli.shared import AsJson, Group, kept, open_group, print_rows, user
from aurora_sgl.console import print_json

alerts_app = typer.Typer(help="What is off, since when, and who takes care of it.")
notify_app = typer.Typer(help="Notifications: webhook and Slack, what was sent, a test.")

Limit = Annotated[int, typer.Option("--limit", min=1, help="How many rows.")]


@alerts_app.command("list")
def alerts_list(
    group: Group = "",
    history: Annotated[bool, typer.Option("--history", help="Also those that are over.")] = False,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List alerts as the scheduler wrote them down, newest first."""
    from aurora_sgl.rollout import alerts

    engine, owner = open_group(group)
    rows = [
        {
            "id": row.id,
            "kind": row.kind,
            "severity": row.severity,
            "text": row.text,
            "began_at": row.began_at,
            "ended_at": row.ended_at,
            "acknowledged_by": row.acknowledged_by,
            "acknowledged_at": row.acknowledged_at,
            "acknowledgement": row.acknowledgement,
        }
        for row in alerts.history(engine, owner.name, limit=None if not history else limit)
        if history or row.ended_at is None
    ][:limit]
    columns = {"alert": "id", "severity": "severity", "kind": "kind", "since": "began_at",
               "until": "ended_at", "taken by": "acknowledged_by", "what": "text"}  # fmt: skip
    print_rows("alerts", columns, rows, as_json=as_json)


@alerts_app.command("acknowledge")
def alerts_acknowledge(
    alert: Annotated[int, typer.Argument(help="Number of the alert.")],
    group: Group = "",
    actor: Actor = "",
    reason: Annotated[str, typer.Option("--reason", help="What you do about it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Say that you take care of an alert. It goes on until what it says is over."""
    from aurora_sgl.rollout import alerts

    engine, owner = open_group(group, writes=True)
    row = alerts.acknowledge(
        engine, owner.name, alert, actor=kept(actor) or user(), note=kept(reason)
    )
    if as_json:
        print_json({"id": row.id, "acknowledged_by": row.acknowledged_by})
    else:
        print(f"alert {row.id} is taken by {row.acknowledged_by}: {row.text}")


@notify_app.command("list")
def notify_list(group: Group = "", limit: Limit = 50, as_json: AsJson = False) -> None:
    """List what people were told, newest first, and whether it arrived."""
    from aurora_sgl import store
    from aurora_sgl.store import queries

    engine, owner = open_group(group)
    with store.session(engine, write=False) as s:
        pairs = queries.notifications.notifications(s, owner.id, limit=limit)
    rows: list[dict[str, Any]] = [
        {
            "id": row.id,
            "kind": row.kind,
            "severity": row.severity,
            "title": row.title,
            "text": row.text,
            "happened_at": row.happened_at,
            "sent": {
                one.target: one.state if one.state != "waiting" else one.error or "waiting"
                for one in deliveries
            },
        }
        for row, deliveries in pairs
    ]
    if not as_json:
        for row in rows:
            row["sent"] = ", ".join(f"{name}: {state}" for name, state in row["sent"].items())
    columns = {"number": "id", "when": "happened_at", "severity": "severity", "kind": "kind",
               "what": "title", "sent": "sent"}  # fmt: skip
    print_rows("notifications", columns, rows, as_json=as_json)


@notify_app.command("test")
def notify_test(group: Group = "", as_json: AsJson = False) -> None:
    """Send a test to each receiver that the settings name, and say whether it arrived."""
    from aurora_sgl.config import NotifySettings, get_settings
    from aurora_sgl.scheduler import courier

    outcomes = courier.try_receivers(
        NotifySettings(), group=group or get_settings().group, actor=user()
    )
    rows = [
        {"receiver": target, "arrived": one.delivered, "why not": one.error}
        for target, one in outcomes.items()
    ]
    columns = {name: name for name in ("receiver", "arrived", "why not")}
    print_rows("test", columns, rows, as_json=as_json)
    if not all(one.delivered for one in outcomes.values()):
        raise typer.Exit(1)
