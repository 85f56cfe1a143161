"""promote and rollback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from aurora_sgl.cli.shared import AsJson, DryRun, Group, Version, kept, open_group, user, version_id
from aurora_sgl.console import print_json

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from aurora_sgl.rollout.promote import Change

Reason = Annotated[
    str, typer.Option("--reason", callback=kept, help="The reason, kept with the deployment.")
]
Actor = Annotated[
    str, typer.Option("--actor", callback=kept, help="Your name (default: user and host).")
]
ExpectLive = Annotated[
    str,
    typer.Option(
        "--expect-live",
        "--expected-live",
        help="Refuse if another version is live than this one (none: no version at all).",
    ),
]


def promote(
    version: Version,
    reason: Reason,
    group: Group = "",
    actor: Actor = "",
    expect_live: ExpectLive = "",
    evaluation: Annotated[
        int | None, typer.Option(help="The evaluation that this rests on.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Promote without a pass.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Put a version live in every server of the group, without a restart."""
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    change = rollout.promote(
        engine,
        version_id(engine, owner.name, version),
        actor=actor or user(),
        reason=reason,
        expected_live=_expected(engine, owner.name, expect_live),
        evaluation_id=evaluation,
        dry_run=dry_run,
        force=force,
    )
    _print_change(change, as_json)


def rollback(
    reason: Reason,
    group: Group = "",
    actor: Actor = "",
    to: Annotated[str, typer.Option(help="An earlier live version (default: the previous).")] = "",
    expect_live: ExpectLive = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Roll back: put the previous version live again."""
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    change = rollout.rollback(
        engine,
        owner.name,
        actor=actor or user(),
        reason=reason,
        to=version_id(engine, owner.name, to) if to else None,
        expected_live=_expected(engine, owner.name, expect_live),
        dry_run=dry_run,
    )
    _print_change(change, as_json)


def _expected(engine: Engine, group: str, name: str) -> int | None:
    from aurora_sgl.rollout.promote import NONE_LIVE

    if not name:
        return None
    return NONE_LIVE if name == "none" else version_id(engine, group, name)


def _print_change(change: Change, as_json: bool) -> None:
    if as_json:
        print_json(change)
    elif not change.changed:
        print(f"version {change.version_id} is live already; nothing was changed")
    else:
        would = "would put" if change.dry_run else "put"
        print(
            f"{change.action}: {would} version {change.version_id} live in group "
            f"{change.group!r} (generation {change.generation}, before: "
            f"{change.previous_version_id or 'none'})"
        )
