"""db purge, backup and restore."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aurora_sgl.cli.shared import AsJson, DryRun, kept, moment, open_store, user
from aurora_sgl.console import print_error, print_json, print_table

if TYPE_CHECKING:
    from aurora_sgl.store.purge import Selector


def db_purge(
    request: Annotated[int | None, typer.Option(help="The number of a request.")] = None,
    rid: Annotated[str | None, typer.Option(help="All requests that a client called so.")] = None,
    conversation: Annotated[
        str | None, typer.Option(help="A conversation: as the client named it, or its hash.")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="All requests of a domain.")] = None,
    before: Annotated[
        str | None,
        typer.Option(help="Only what was admitted before: 2026-11-24, 2026-11-24T10:30 (UTC)."),
    ] = None,
    reason: Annotated[
        str, typer.Option(callback=kept, help="Why; kept, so name nobody in it.")
    ] = "",
    actor: Annotated[str, typer.Option(callback=kept, help="Who (default: user and host).")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds that running sidecars and readers get.")
    ] = 30.0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove requests from tables, files, spools and training state, for good."""
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.config import get_settings
    from aurora_sgl.erasure import purge

    named = {"request": request, "rid": rid, "conversation": conversation, "domain": domain}
    selector = _selector({k: str(v) for k, v in named.items() if v is not None}, before)
    if not dry_run:
        _confirm(reason, yes)
    settings = get_settings()
    report = purge(
        open_store(),
        ArtifactRoot(),
        settings.home.resolve(),
        selector,
        actor=actor or user(),
        reason=reason,
        group=settings.group,
        dry_run=dry_run,
        wait_seconds=wait,
    )
    if as_json:
        print_json(report)
    else:
        rows = [{"name": name.replace("_", " "), "value": v} for name, v in vars(report).items()]
        print_table("would go" if dry_run else "gone", {"": "name", " ": "value"}, rows)
    if report.left:
        print_error(f"not finished, call it again: {'; '.join(report.left)}")
        raise typer.Exit(1)


def _selector(named: dict[str, str], before: str | None) -> Selector:
    from aurora_sgl.clock import utc_now
    from aurora_sgl.store.purge import Selector

    if len(named) > 1 or not (named or before):
        raise typer.BadParameter(
            "say one of --request, --rid, --conversation, --domain, with or without --before, or "
            "--before alone"
        )
    until = utc_now() if before is None else moment(before, "--before")
    for kind, value in named.items():
        return Selector(kind, value, until)
    return Selector("before", "", until)


def _confirm(reason: str, yes: bool) -> None:
    if not reason.strip():
        raise typer.BadParameter("a purge needs a reason", param_hint="--reason")
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody can be asked here; add --yes, or --dry-run to look first")
    typer.confirm("This can't be undone. Purge?", abort=True)


def db_backup(
    folder: Annotated[Path, typer.Argument(help="A new folder.")], as_json: AsJson = False
) -> None:
    """Copy the store and the files that its rows name into a folder, while all goes on."""
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.backup import back_up

    report = back_up(open_store(), ArtifactRoot(), folder)
    if as_json:
        print_json(report)
    else:
        rows = [{"name": name.replace("_", " "), "value": v} for name, v in vars(report).items()]
        print_table(f"backed up to {folder}", {"": "name", " ": "value"}, rows)
    if report.versions_without_weights:
        print_error(
            f"the weights of versions {report.versions_without_weights} are missing or damaged; "
            "they are not in the backup"
        )
        raise typer.Exit(1)


def db_restore(
    folder: Annotated[Path, typer.Argument(help="A folder that db backup made.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a store that has something in it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup in the place of the store, and its files into the artifact root."""
    from aurora_sgl import store
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.backup import restore
    from aurora_sgl.config import get_settings

    home = get_settings().home.resolve()
    report = restore(store.connect(), ArtifactRoot(), folder, home, force=force)
    if as_json:
        print_json(report)
    else:
        rows = [{"name": name.replace("_", " "), "value": v} for name, v in vars(report).items()]
        print_table(f"restored from {folder}", {"": "name", " ": "value"}, rows)
