"""versions note, tag and untag."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_sgl.cli.rollout import Actor
from aurora_sgl.cli.shared import AsJson, Group, Version, columns_of, open_group, user, version_id
from aurora_sgl.console import print_json

Tags = Annotated[
    list[str], typer.Argument(help="Words of letters, digits, dots, hyphens and underscores.")
]


def versions_note(
    version: Version,
    text: Annotated[str, typer.Argument(help="What is to be known of it.")],
    group: Group = "",
    actor: Actor = "",
    as_json: AsJson = False,
) -> None:
    """Write a note about a version. It stays."""
    from aurora_sgl.rollout import notes

    engine, owner = open_group(group)
    number = version_id(engine, owner.name, version)
    row = notes.add_note(engine, number, text, actor=actor or user())
    if as_json:
        print_json(columns_of(row))
    else:
        print(f"noted of version {number} by {row.actor}")


def versions_tag(
    version: Version, tags: Tags, group: Group = "", actor: Actor = "", as_json: AsJson = False
) -> None:
    """Give a version tags, by which it is found."""
    _change(version, tags, True, group, actor, as_json)


def versions_untag(
    version: Version, tags: Tags, group: Group = "", actor: Actor = "", as_json: AsJson = False
) -> None:
    """Take tags off a version."""
    _change(version, tags, False, group, actor, as_json)


def _change(
    version: str, tags: list[str], give: bool, group: str, actor: str, as_json: bool
) -> None:
    from aurora_sgl.rollout import notes

    engine, owner = open_group(group)
    number = version_id(engine, owner.name, version)
    act = notes.tag if give else notes.untag
    change = act(engine, number, tags, actor=actor or user())
    if as_json:
        print_json(change)
    else:
        print(f"tags of version {number}: {', '.join(change.tags) or 'none'}")
