"""The command line: one short function a command, each calling one room.

Exit codes: 0 done, 1 refused or failed (one line on stderr says why), 2 wrong use. Heavy imports
stay inside the functions, so that ``aurora-sgl --help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aurora_sgl import __version__
from aurora_sgl.cli import (
    dashboard,
    db,
    erase,
    learning,
    notes,
    notify,
    operating,
    refused,
    rollout,
    serving,
    versions,
    worth,
)
from aurora_sgl.console import print_error
from aurora_sgl.errors import AuroraError
from aurora_sgl.private import denied, keep_to_owner

_OWN_PLACE = "run this as its owner, or name a place of your own (AURORA_HOME: the data folder)"

app = typer.Typer(
    name="aurora-sgl",
    help="SGLang whose drafter keeps learning from the requests that it serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serving.serve
)
for command in (
    serving.demo,
    learning.train,
    learning.replay,
    operating.scheduler,
    operating.status,
    operating.watch,
    worth.worth,
    rollout.promote,
    rollout.rollback,
    db.doctor,
):
    app.command()(command)
db.db_app.command("purge")(erase.db_purge)
db.db_app.command("backup")(erase.db_backup)
db.db_app.command("restore")(erase.db_restore)
for name, add in (
    ("note", notes.versions_note),
    ("tag", notes.versions_tag),
    ("untag", notes.versions_untag),
):
    versions.versions_app.command(name)(add)
app.add_typer(versions.versions_app, name="versions", no_args_is_help=True)
app.add_typer(operating.switch_app, name="switch", no_args_is_help=True)
app.add_typer(operating.trial_app, name="trial", no_args_is_help=True)
app.add_typer(rollout.freeze_app, name="freeze", no_args_is_help=True)
app.add_typer(notify.alerts_app, name="alerts", no_args_is_help=True)
app.add_typer(notify.notify_app, name="notify", no_args_is_help=True)
db.db_app.command("refused")(refused.db_refused)
app.add_typer(db.db_app, name="db", no_args_is_help=True)
app.add_typer(dashboard.dashboard_app, name="dashboard")


def main() -> None:
    """The console script ``aurora-sgl``."""
    keep_to_owner()
    try:
        app()
    except AuroraError as error:
        print_error(str(error))
        sys.exit(1)
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        print_error(line)
        sys.exit(1)


def _one_line(error: Exception) -> str | None:
    """What a user can mend, said in one line; ``None`` for what is our own mistake."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    if isinstance(error, SettingsError):
        why = f" ({denied(cause)})" if isinstance(cause := error.__cause__, OSError) else ""
        return f"a setting can't be read: {' '.join(str(error).split())}{why}"
    if isinstance(error, ValidationError):
        from aurora_sgl.config import variable_of

        return f"setting {variable_of(error)}: {error.errors()[0]['msg']}"
    if isinstance(error, UnicodeDecodeError):
        return f"a file that should be UTF-8 text is not, perhaps .env ({error.reason})"
    if isinstance(error, OSError):
        line = f"{error.filename or ''}: {denied(error)}".removeprefix(": ")
        return f"{line}; {_OWN_PLACE}" if isinstance(error, PermissionError) else line
    if "sqlalchemy" in sys.modules:
        from aurora_sgl.store.faults import is_away, may_not, with_advice

        if is_away(error):
            what = "does not allow this" if may_not(error) else "can't be used now"
            return f"the store {what}: {with_advice(error)}"
    return None


def _say_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    pass
