"""scheduler, status, watch, switch and trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from aurora_sgl.cli.rollout import Actor, Reason
from aurora_sgl.cli.shared import (
    AsJson,
    DryRun,
    Group,
    Version,
    columns_of,
    open_group,
    print_rows,
    read_choices,
    user,
    version_id,
)
from aurora_sgl.clock import utc_now
from aurora_sgl.console import print_json, print_table, text_of

if TYPE_CHECKING:
    from aurora_sgl.rollout.run_progress import RunProgress
    from aurora_sgl.rollout.stages import StageStatus
    from aurora_sgl.rollout.status import GroupStatus, RetentionStatus
    from aurora_sgl.rollout.trial import TrialStatus
    from aurora_sgl.rollout.watch import WatchStatus

switch_app = typer.Typer(help="Kill switches: learning, auto_promote.")
trial_app = typer.Typer(help="Switchback trials: two versions take turns on the same traffic.")

SwitchName = Annotated[str, typer.Argument(help="learning or auto_promote.")]


def scheduler(
    group: Group = "",
    recipe: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A training setting, such as passes=2."),
    ] = None,
) -> None:
    """Run the scheduler until Ctrl-C: train, promote what passes the gate, watch it, roll back."""
    from aurora_sgl.config import SchedulerSettings, get_settings
    from aurora_sgl.scheduler.service import run

    chosen = read_choices(recipe or [])
    run(get_settings(), SchedulerSettings(), group=group, recipe=chosen)


def status(group: Group = "", as_json: AsJson = False) -> None:
    """Show what is live, what is running, and what the scheduler will do next and why."""
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    now = rollout.status.look(engine, owner.name)
    held_out = rollout.status.held_out(engine, owner.name)
    if as_json:
        print_json(
            {
                **{name: value for name, value in vars(now).items()},
                "servers": [vars(each) for each in now.servers],
                "switches": [vars(each) for each in now.switches],
                "scheduler": vars(now.scheduler),
                "watch": _watch_json(now.watch),
                "trial": _trial_json(now.trial),
                "stage": _stage_json(now.stage),
                "freeze": columns_of(now.freeze) if now.freeze is not None else None,
                "held_out": vars(held_out),
                "last_verdict": vars(now.last_verdict) if now.last_verdict else None,
                "not_live": vars(now.not_live) if now.not_live else None,
                "training": now.training.as_json() if now.training else None,
                "retention": vars(now.retention),
            }
        )
        return
    names = ", ".join(f"{name}: version {number}" for name, number in sorted(now.aliases.items()))
    print(f"group {now.group!r}, generation {now.generation}: {names or 'nothing is live'}")
    servers = {"server": "name", "live": "live_version_id", "should be": "wanted_version_id",
               "phase": "phase", "drafts": "speculation_share", "why not": "reason"}  # fmt: skip
    print_table("servers", servers, [vars(each) for each in now.servers])
    for server in now.servers:
        for notice in server.notices:
            print(f"{server.name}: {notice}")
    trees = [{"server": server.name, **one} for server in now.servers for one in server.trees]
    if trees:
        columns = {"server": "server", "at once up to": "requests_at_once", "depth": "depth",
                   "nodes": "nodes", "share": "share", "accept length": "accept_length",
                   "explored": "explored"}  # fmt: skip
        print_table("trees of the last steps", columns, trees)
    switches = {"switch": "name", "on": "on", "by": "actor", "reason": "reason"}
    print_table("switches", switches, [vars(each) for each in now.switches])
    doing = now.scheduler
    print(f"scheduler: {doing.state or 'none'}: {doing.reason}")
    if doing.next_action:
        when = f" (at the latest {text_of(doing.next_at)} UTC)" if doing.next_at else ""
        print(f"next: {doing.next_action}{when}")
    _print_training(now.training)
    print(f"evidence: {held_out.sentence}")
    if now.last_verdict is not None:
        last = now.last_verdict
        print(f"last verdict: version {last.version_id} {last.verdict}: {last.reason}")
    if now.not_live is not None:
        print(f"not live: {now.not_live.sentence}")
    print(_retention_line(now.retention))
    _print_what_goes_on(now)


def _print_what_goes_on(now: GroupStatus) -> None:
    """The watch, the trial, the stage and the freeze, where there is one."""
    from aurora_sgl.rollout import freezes

    if now.watch is not None:
        print(_watch_line(now.watch))
    if now.trial is not None:
        print(_trial_line(now.trial))
    if now.stage is not None:
        one = now.stage.stage
        where = ", ".join(one.servers)
        print(f"stage of version {one.version_id} on {where}: {now.stage.sentence}")
    if now.freeze is not None:
        print(f"group {now.group!r} is {freezes.sentence(now.freeze)}")


def _stage_json(stage: StageStatus | None) -> dict[str, Any] | None:
    if stage is None:
        return None
    return {**columns_of(stage.stage), "windows_planned": stage.planned}


def watch(
    group: Group = "",
    carry_on: Annotated[
        bool, typer.Option("--carry-on", help="Continue the watch to its end without a scheduler.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the watch over the last promotion: its windows and its result."""
    import time

    from aurora_sgl import rollout

    engine, owner = open_group(group)
    while carry_on and rollout.watch.tick(engine, owner.id) is not None:
        time.sleep(2.0)
    report = rollout.watch.status(engine, owner.name)
    if as_json:
        print_json(_watch_json(report))
    elif report is None:
        print(f"nothing was promoted over another version in group {owner.name!r} yet")
    else:
        print(_watch_line(report))
        columns = {"window": "number", "requests": "requests", "steps": "verify_steps",
                   "accept length": "accept_length", "expected": "expected_accept_length",
                   "tokens/s": "tokens_per_second", "before": "expected_tokens_per_second",
                   "verdict": "verdict"}  # fmt: skip
        print_table("windows", columns, [columns_of(row) for row in report.windows])


@switch_app.command("list")
def switch_list(group: Group = "", as_json: AsJson = False) -> None:
    """List the switches and who changed each last."""
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    rows = [vars(each) for each in rollout.switches.read(engine, owner.name)]
    columns = {"switch": "name", "on": "on", "by": "actor", "at (UTC)": "updated_at",
               "reason": "reason"}  # fmt: skip
    print_rows(f"switches of group {owner.name!r}", columns, rows, as_json)


@switch_app.command("on")
def switch_on(
    name: SwitchName,
    reason: Reason,
    group: Group = "",
    actor: Actor = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Turn a switch on."""
    _turn(name, True, reason, group, actor, dry_run, as_json)


@switch_app.command("off")
def switch_off(
    name: SwitchName,
    reason: Reason,
    group: Group = "",
    actor: Actor = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Turn a switch off; this takes effect within five seconds."""
    _turn(name, False, reason, group, actor, dry_run, as_json)


def _turn(
    name: str, on: bool, reason: str, group: str, actor: str, dry_run: bool, as_json: bool
) -> None:
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    change = rollout.switches.turn(
        engine, owner.name, name, on, actor=actor or user(), reason=reason, dry_run=dry_run
    )
    state = "on" if on else "off"
    if as_json:
        print_json(change)
    elif not change.changed:
        print(f"{name} is {state} already; nothing was changed")
    else:
        print(f"{name} {'would be' if dry_run else 'is'} {state} in group {owner.name!r}")


@trial_app.command("start")
def trial_start(
    version: Version,
    reason: Reason,
    group: Group = "",
    actor: Actor = "",
    seed: Annotated[int, typer.Option(help="Seed of the order of the windows.")] = 0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Start a live comparison: a version and the live one take turns on real traffic."""
    from aurora_sgl import rollout
    from aurora_sgl.console import print_error

    engine, owner = open_group(group)
    plan = rollout.trial.start(
        engine,
        version_id(engine, owner.name, version),
        actor=actor or user(),
        reason=reason,
        seed=seed,
        dry_run=dry_run,
    )
    if as_json:
        print_json(plan)
    else:
        would = "would take" if dry_run else "take"
        name = "a trial" if plan.trial_id is None else f"trial {plan.trial_id}"
        print(
            f"{name}: versions {plan.baseline_id} and {plan.candidate_id} {would} turns in "
            f"{plan.windows} windows, {plan.seconds / 60:.0f} minutes together"
        )
    if not rollout.status.scheduler(engine, owner.name).alive:
        print_error("no scheduler is running to open its windows; start: aurora-sgl scheduler")


@trial_app.command("stop")
def trial_stop(
    reason: Reason,
    group: Group = "",
    actor: Actor = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """End the running trial without a verdict; servers go back to the live version."""
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    report = rollout.trial.stop(
        engine, owner.name, actor=actor or user(), reason=reason, dry_run=dry_run
    )
    if as_json:
        print_json(_trial_json(report))
    elif report is None:
        print(f"no trial is running in group {owner.name!r}; nothing was changed")
    else:
        print(f"trial {report.trial.id} {'would be' if dry_run else 'is'} stopped")


@trial_app.command("status")
def trial_status(group: Group = "", as_json: AsJson = False) -> None:
    """Show the newest trial, its windows and its verdict."""
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    report = rollout.trial.status(engine, owner.name)
    if as_json:
        print_json(_trial_json(report))
    elif report is None:
        print(f"there was no trial in group {owner.name!r} yet")
    else:
        print(_trial_line(report))
        columns = {"window": "number", "version": "version_id", "requests": "requests",
                   "steps": "verify_steps", "accept length": "accept_length",
                   "tokens/s of a stream": "stream_tokens_per_second"}  # fmt: skip
        rows = [{**columns_of(row), **row.metrics} for row in report.windows]
        print_table("windows", columns, rows)


def _print_training(run: RunProgress | None) -> None:
    if run is not None:
        print(f"training: {run.sentence(utc_now())}")


def _watch_json(report: WatchStatus | None) -> dict[str, Any] | None:
    if report is None:
        return None
    windows = [columns_of(row) for row in report.windows]
    return {**columns_of(report.watch), "windows": windows}


def _watch_line(report: WatchStatus) -> str:
    row = report.watch
    reason = f": {row.reason}" if row.reason else ""
    done = f"{len(report.windows)} windows so far" if row.status == "running" else row.status
    return f"watch over version {row.version_id} (against {row.baseline_id}): {done}{reason}"


def _trial_json(report: TrialStatus | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        **columns_of(report.trial),
        "planned": report.planned,
        "windows": [columns_of(row) for row in report.windows],
        "evaluation": columns_of(report.evaluation) if report.evaluation is not None else None,
    }


def _trial_line(report: TrialStatus) -> str:
    row = report.trial
    done = f"{len(report.windows)} of {report.planned} windows"
    why = row.details.get("why") or row.details.get("stopped_by") or ""
    verdict = f", {row.verdict}" if row.verdict else ""
    reason = f": {why}" if why else ""
    return (
        f"trial {row.id} of version {row.candidate_id} against {row.baseline_id}: {row.status} "
        f"({done}){verdict}{reason}"
    )


def _retention_line(kept: RetentionStatus) -> str:
    last = f"{text_of(kept.started_at)} UTC by {kept.actor}: " if kept.started_at else ""
    due = (
        f"next after {text_of(kept.due_at)} UTC"
        if kept.due_at
        else "no limits are set yet (a server that joins does, or: aurora-sgl db limits --set)"
    )
    return f"retention: {last}{kept.sentence}; {due}"
