"""db refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_sgl.cli.shared import AsJson, open_store, print_rows

COLUMNS = {"spool": "spool", "records": "records", "kind": "kind", "last": "last", "why": "why"}


def db_refused(
    retry: Annotated[bool, typer.Option("--retry", help="Try to store them now.")] = False,
    spool: Annotated[
        Path | None, typer.Option(help="Folder of a spool (default: those of AURORA_HOME).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the store refused and sidecars of this machine set aside, or try it again."""
    from aurora_sgl.config import get_settings
    from aurora_sgl.sidecar import retry as refused

    folders = [spool] if spool is not None else refused.folders(get_settings().home.resolve())
    if not retry:
        rows = [
            {"spool": str(folder), **row._asdict()}
            for folder in folders
            for row in refused.refused_groups(folder)
        ]
        print_rows("refused records", COLUMNS, rows, as_json)
        return
    engine = open_store(writes=True)
    results = [{"spool": str(folder), **refused.retry(engine, folder)} for folder in folders]
    empty = {"stored": 0, "refused": 0, "unreadable": 0}
    columns = {"spool": "spool", "stored": "stored", "refused again": "refused",
               "unreadable": "unreadable"}  # fmt: skip
    print_rows("refused records, tried again", columns, [empty | one for one in results], as_json)
    raise typer.Exit(1 if any(one.get("refused") for one in results) else 0)
