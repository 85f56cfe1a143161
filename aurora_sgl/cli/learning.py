"""train and replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aurora_sgl.cli.shared import (
    AsJson,
    Group,
    open_group,
    print_rows,
    read_recipe,
    read_window,
    version_id,
)
from aurora_sgl.console import print_error, print_json


def train(
    once: Annotated[bool, typer.Option("--once", help="Train once and exit.")] = False,
    group: Group = "",
    base: Annotated[str, typer.Option(help="Version to start from (default: the live one).")] = "",
    objective: Annotated[str | None, typer.Option(help="Training loss.")] = None,
    window: Annotated[
        str, typer.Option(metavar="N|TIME", help="Newest requests, or a time: 400, 90m, 6h, 2d.")
    ] = "",
    domain: Annotated[list[str] | None, typer.Option(help="Only these domains.")] = None,
    target: Annotated[Path | None, typer.Option(help="Folder of the target model.")] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A training setting, such as passes=2."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train on the store's recent requests; the result is a new version, not yet live."""
    if not once:
        raise typer.BadParameter("say --once: one run, now", param_hint="train")
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.cli.progress import training_progress
    from aurora_sgl.training.lease import training_lease
    from aurora_sgl.training.run import train_once

    settings = read_recipe(recipe or [], objective=objective, domains=domain, **read_window(window))
    engine, owner = open_group(group)
    base_id = version_id(engine, owner.name, base) if base else None
    with training_lease(engine, owner.id) as renew, training_progress(quiet=as_json) as show:

        def progress(event: dict[str, Any]) -> None:
            renew(event)
            show(event)

        outcome = train_once(
            engine,
            ArtifactRoot(),
            owner.name,
            settings,
            trigger="manual",
            progress=progress,
            target=target,
            base_version_id=base_id,
        )
    if as_json:
        print_json(outcome.as_json())
    elif outcome.status == "succeeded":
        run_id, why = outcome.run_id, outcome.reason
        print(f"version {outcome.version_id}: {outcome.verdict}: {why} (run {run_id})")
    else:
        print_error(f"training {outcome.status}: {outcome.error}")
    raise typer.Exit(0 if outcome.status == "succeeded" else 1)


def replay(
    versions: Annotated[
        list[str] | None, typer.Argument(help="Versions; the first is the baseline.")
    ] = None,
    version: Annotated[
        list[str] | None,
        typer.Option(help="A version to compare (repeatable)."),
    ] = None,
    group: Group = "",
    requests: Annotated[int, typer.Option(min=1, help="Newest requests to replay.")] = 200,
    every: Annotated[
        bool, typer.Option("--all", help="Replay requests that were trained on too.")
    ] = False,
    domain: Annotated[list[str] | None, typer.Option(help="Only these domains.")] = None,
    target: Annotated[Path | None, typer.Option(help="Folder of the target model.")] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Draft shape: depth=3, topk=4, nodes=8."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay versions offline: the accept length that each would have had on held-out requests."""
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.cli.progress import counted_progress
    from aurora_sgl.evaluation.compare import replay_versions

    asked = [*(versions or []), *(version or [])]
    if not asked:
        raise typer.BadParameter("name one version or more", param_hint="--version")
    settings = read_recipe(recipe or [])
    engine, owner = open_group(group)
    ids = [version_id(engine, owner.name, each) for each in asked]
    with counted_progress("replaying", quiet=as_json) as progress:
        lines = replay_versions(
            engine,
            ArtifactRoot(),
            owner,
            ids,
            settings,
            limit=requests,
            domains=domain,
            only_held_out=not every,
            target=target,
            progress=progress,
        )
    columns = {
        "version": "version_id",
        "domain": "domain",
        "rule": "accept_rule",
        "requests": "requests",
        "accept length": "accept_length",
        "difference": "difference",
        "95% from": "ci_low",
        "to": "ci_high",
    }
    rows = [
        {**vars(line), "domain": line.domain or "all", "accept_rule": line.accept_rule or "all"}
        for line in lines
    ]
    print_rows("replay", columns, rows, as_json)
