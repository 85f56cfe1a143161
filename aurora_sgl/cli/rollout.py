"""promote, also in stages, rollback and freezes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from aurora_sgl.cli.shared import (
    AsJson,
    DryRun,
    Group,
    columns_of,
    kept,
    moment,
    open_group,
    print_rows,
    user,
    version_id,
)
from aurora_sgl.console import print_json

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from aurora_sgl.rollout.promote import Change
    from aurora_sgl.rollout.stages import StagePlan, StageStatus

freeze_app = typer.Typer(help="Times in which nothing goes live by itself.")

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
    reason: Reason,
    version: Annotated[
        str, typer.Argument(help="An id, an alias (live, previous), or a hash's start.")
    ] = "",
    group: Group = "",
    actor: Actor = "",
    expect_live: ExpectLive = "",
    evaluation: Annotated[
        int | None, typer.Option(help="The evaluation that this rests on.")
    ] = None,
    stage: Annotated[
        str,
        typer.Option(help="Servers that run it first: a number, a share (25%), or names."),
    ] = "",
    goes_on: Annotated[
        bool, typer.Option("--goes-on", help="With --stage: to the rest by itself if it passes.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Promote the staged version to the rest.")
    ] = False,
    abort: Annotated[
        bool, typer.Option("--abort", help="Take the staged version off its servers.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Promote without a pass.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Put a version live in every server of the group, or in some first, without a restart."""
    from aurora_sgl import rollout

    _one_of(version, stage, go_on=go_on, abort=abort, goes_on=goes_on)
    engine, owner = open_group(group)
    who = actor or user()
    if abort:
        ended = rollout.stages.abort(engine, owner.name, actor=who, reason=reason, dry_run=dry_run)
        _print_abort(ended, dry_run, as_json)
        return
    if go_on:
        change = rollout.stages.go_on(
            engine, owner.name, actor=who, reason=reason, force=force, dry_run=dry_run
        )
        _print_change(change, as_json)
        return
    if stage:
        plan = rollout.stages.start(
            engine, version_id(engine, owner.name, version), stage, actor=who, reason=reason,
            goes_on=goes_on, expected_live=_expected(engine, owner.name, expect_live),
            force=force, dry_run=dry_run,
        )  # fmt: skip
        _print_plan(plan, as_json)
        return
    change = rollout.promote(
        engine,
        version_id(engine, owner.name, version),
        actor=who,
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


def _one_of(version: str, stage: str, *, go_on: bool, abort: bool, goes_on: bool) -> None:
    """Refuse words that say two things, or none."""
    if go_on and abort:
        raise typer.BadParameter("--continue and --abort are two things; say one")
    if (go_on or abort) and (version or stage):
        word = "--continue" if go_on else "--abort"
        raise typer.BadParameter(f"{word} is about the stage that is open; leave the rest out")
    if not (version or go_on or abort):
        raise typer.BadParameter("say which version, as in: aurora-sgl promote 4 --reason WHY")
    if goes_on and not stage:
        raise typer.BadParameter("--goes-on needs a stage, as in --stage 1")


def _print_plan(plan: StagePlan, as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    would = "would run" if plan.dry_run else "runs"
    after = (
        "and goes on to the rest by itself if it passes" if plan.goes_on
        else "then: aurora-sgl promote --continue, or --abort"
    )  # fmt: skip
    print(
        f"stage: version {plan.version_id} {would} on {', '.join(plan.servers)} first, judged "
        f"against {', '.join(plan.others)}; {after}"
    )


def _print_abort(ended: StageStatus, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({**columns_of(ended.stage), "dry_run": dry_run})
        return
    would = "would go back" if dry_run else "go back"
    print(
        f"abort: {', '.join(ended.stage.servers)} {would} from version {ended.stage.version_id} "
        f"to version {ended.stage.baseline_id}"
    )


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


@freeze_app.command("list")
def freeze_list(group: Group = "", as_json: AsJson = False) -> None:
    """List freezes, also those that are over or to come."""
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    rows = [columns_of(row) for row in rollout.freezes.freezes(engine, owner.name)]
    columns = {"freeze": "id", "from": "starts_at", "to": "ends_at", "by": "actor",
               "reason": "reason", "lifted": "lifted_at", "lifted by": "lifted_by"}  # fmt: skip
    print_rows("freezes", columns, rows, as_json=as_json)


@freeze_app.command("add")
def freeze_add(
    reason: Reason,
    until: Annotated[
        str, typer.Option("--to", help="Its end: 2026-12-27T10:30 (UTC), or 6h, 2d after --from.")
    ],
    since: Annotated[str, typer.Option("--from", help="Its beginning (default: now).")] = "",
    group: Group = "",
    actor: Actor = "",
    as_json: AsJson = False,
) -> None:
    """Let nothing go live by itself for a time. People may still promote."""
    from aurora_sgl import rollout
    from aurora_sgl.clock import utc_now

    engine, owner = open_group(group, writes=True)
    begin = moment(since, "--from") if since else utc_now()
    row = rollout.freezes.add(
        engine, owner.name, actor=actor or user(), reason=reason,
        starts_at=begin, ends_at=moment(until, "--to", begin),
    )  # fmt: skip
    if as_json:
        print_json(columns_of(row))
    else:
        print(
            f"freeze {row.id}: nothing goes live by itself from {row.starts_at:%Y-%m-%d %H:%M} to "
            f"{row.ends_at:%Y-%m-%d %H:%M} UTC"
        )


@freeze_app.command("lift")
def freeze_lift(
    freeze: Annotated[int, typer.Argument(help="Number of the freeze.")],
    reason: Reason,
    group: Group = "",
    actor: Actor = "",
    as_json: AsJson = False,
) -> None:
    """End a freeze before its time."""
    from aurora_sgl import rollout

    engine, owner = open_group(group, writes=True)
    row = rollout.freezes.lift(engine, owner.name, freeze, actor=actor or user(), reason=reason)
    if as_json:
        print_json(columns_of(row))
    else:
        print(f"freeze {row.id} is lifted: versions may go live by themselves again")
