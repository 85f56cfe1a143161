"""serve and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_sgl.cli.shared import AsJson, read_choices


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "--model-path", help="Target model folder.")],
    drafter: Annotated[
        str | None,
        typer.Option(
            help="Drafter folder, or 'scratch' for an untrained one "
            "(default: the live version of the group, else scratch)."
        ),
    ] = None,
) -> None:
    """Serve a model with SGLang and keep its drafter learning.

    Every other flag goes to SGLang as it is (--port, --tp-size, --speculative-num-steps, ...).
    """
    from aurora_sgl.config import get_settings
    from aurora_sgl.serving import serve as run

    run(model, drafter, context.args, get_settings())


def demo(
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many requests to send (default: no limit).")
    ] = None,
    exit_: Annotated[bool, typer.Option("--exit", help="Measure, report and exit.")] = False,
    held_out: Annotated[
        int, typer.Option(min=1, help="How many prompts are measured and never trained on.")
    ] = 24,
    prompts: Annotated[
        Path | None, typer.Option(help="Your own prompts: JSON Lines with 'prompt'.")
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(help="Drafter folder to start with (default: the live one, else untrained)."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=2.0,
            help="Of traffic that has none of its own (default: greedy, 0.7 when prompts repeat).",
        ),
    ] = None,
    turns: Annotated[
        int, typer.Option(min=1, max=32, help="User turns of a chat; each is a request.")
    ] = 1,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A training setting, such as passes=2."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the endpoint; 0: a free one.")] = 0,
    dashboard: Annotated[
        bool, typer.Option(help="Start the web page for operators too (not with --exit).")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Start SGLang with an untrained drafter, send traffic, and watch the drafter improve."""
    from aurora_sgl.demo.run import run

    chosen = read_choices(recipe or [])
    raise typer.Exit(
        run(
            requests=requests,
            stop=exit_,
            held_out=held_out,
            prompts=prompts,
            drafter=drafter,
            temperature=temperature,
            turns=turns,
            recipe=chosen,
            port=port,
            dashboard=dashboard,
            as_json=as_json,
        )
    )
