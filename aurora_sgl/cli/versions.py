"""versions list, show, compare, import, convert, export, pin and unpin; see ``notes`` for the
others."""

from __future__ import annotations

from pathlib import Path
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
    target_of,
    user,
    version_id,
)
from aurora_sgl.console import print_json, print_table
from aurora_sgl.private import users_own

if TYPE_CHECKING:
    from aurora_sgl.rollout.notes import NotesAndTags
    from aurora_sgl.rollout.versions import VersionLine

versions_app = typer.Typer(
    help="Drafter versions: list, show, compare, import, convert, export, pin, note, tag."
)


@versions_app.command("list")
def versions_list(
    group: Group = "",
    search: Annotated[
        str, typer.Option("--search", help='Only those that fit: tag:NAME, words, "a phrase", ID.')
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the versions of a group, oldest first."""
    from aurora_sgl.rollout import notes
    from aurora_sgl.rollout.versions import list_versions

    engine, owner = open_group(group)
    lines = {line.version.id: line for line in list_versions(engine, owner.name)}
    written = notes.read(engine, owner.name)
    fitting = notes.search(search, [line.version for line in lines.values()], written)
    rows = [version_row(lines[one.id], written.get(one.id)) for one in fitting]
    columns = {
        "id": "id",
        "is": "aliases",
        "parent": "parent_id",
        "served": "accept_length",
        "over": "requests",
        "replayed": "replayed_accept_length",
        "from": "note",
        "not live": "not_live",
    }  # narrow enough for 80 columns; --json and `show` have the rest
    if any(row["tags"] for row in rows):
        columns["tags"] = "tags"
    print_rows(f"versions of group {owner.name!r}", columns, rows, as_json)


@versions_app.command("show")
def versions_show(version: Version, group: Group = "", as_json: AsJson = False) -> None:
    """Show one version: where it comes from, how it was judged, when it was live."""
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.rollout import notes
    from aurora_sgl.rollout.versions import show_version

    engine, owner = open_group(group)
    details = show_version(engine, ArtifactRoot(), version_id(engine, owner.name, version))
    written = notes.read(engine, owner.name).get(details.line.version.id)
    row = {
        **columns_of(details.line.version),
        **version_row(details.line, written),
        "lineage": details.lineage,
        "has_weights": details.has_weights,
    }
    evaluations = [columns_of(each) for each in details.evaluations]
    deployments = [columns_of(each) for each in details.deployments]
    remarks = [columns_of(each) for each in (written.notes if written else ())]
    if as_json:
        shown = {"notes": remarks, "evaluations": evaluations, "deployments": deployments}
        print_json({**row, **shown})
        return
    hidden = ["config", "metrics", "weights", *(n for n in ("note", "tags") if not row.get(n))]
    facts = [{"name": k, "value": v} for k, v in row.items() if k not in hidden]
    print_table(f"version {row['id']}", {"": "name", " ": "value"}, facts)
    if remarks:
        by = {"at (UTC)": "created_at", "by": "actor", "note": "text"}
        print_table("notes", by, remarks)
    keys = ("id", "kind", "baseline_id", "requests", "difference", "ci_low", "ci_high", "verdict")
    print_table("evaluations", {key: key for key in keys}, evaluations)
    fields = ("generation", "action", "version_id", "previous_version_id", "actor", "reason")
    print_table("deployments", {key: key for key in fields}, deployments)


@versions_app.command("compare")
def versions_compare(
    version: Version,
    other: Annotated[str, typer.Argument(help="The version that it is set against.")],
    group: Group = "",
    as_json: AsJson = False,
) -> None:
    """Compare two versions: origin, recipe, replay, live traffic at equal shape, trial."""
    from aurora_sgl import store
    from aurora_sgl.cli.compared import facts_as_json, print_facts
    from aurora_sgl.rollout.comparison import pair_facts
    from aurora_sgl.rollout.equal_shape import positions, served_at_equal_shape

    engine, owner = open_group(group)
    ids = [version_id(engine, owner.name, each) for each in (version, other)]
    with store.session(engine, write=False) as s:
        facts = pair_facts(s, owner.id, *ids)
        served = served_at_equal_shape(s, owner.id, *ids)
        shares = positions(s, *ids)
    if as_json:
        print_json(facts_as_json(facts, served, shares))
    else:
        print_facts(facts, served, shares)


@versions_app.command("import")
def versions_import(
    folder: Annotated[Path, typer.Argument(help="A drafter folder in Hugging Face's format.")],
    group: Group = "",
    note: Annotated[str, typer.Option(help="A note that is kept with the version.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check a drafter folder and store it as a version, which is not live yet."""
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.rollout.versions import import_version

    engine, owner = open_group(group, writes=True)
    version = import_version(
        engine, ArtifactRoot(), folder, owner.name, note=note, target=target_of(owner)
    )
    if as_json:
        print_json(columns_of(version))
    else:
        print(f"version {version.id} ({version.weights_sha256[:16]})")


@versions_app.command("convert")
def versions_convert(
    folder: Annotated[Path, typer.Argument(help="A drafter folder with pytorch_model.bin.")],
    into: Annotated[Path, typer.Argument(help="A new folder, with model.safetensors.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing one.")] = False,
) -> None:
    """Make safetensors of a pickle, in a process of its own that runs nothing in it."""
    from aurora_sgl.drafter.convert import convert

    print(convert(folder, into, force=force))


@versions_app.command("export")
def versions_export(
    version: Version,
    into: Annotated[Path, typer.Argument(help="A new folder; any SGLang loads it.")],
    group: Group = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing one.")] = False,
) -> None:
    """Copy a version into a folder, checked by its hash."""
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.rollout.versions import export_version

    engine, owner = open_group(group)
    number = version_id(engine, owner.name, version)
    with users_own():
        print(export_version(engine, ArtifactRoot(), number, into, force=force))


@versions_app.command("pin")
def versions_pin(
    version: Version,
    reason: Reason,
    group: Group = "",
    actor: Actor = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Keep a version's weights from being pruned."""
    _pin(version, True, reason, group, actor, dry_run, as_json)


@versions_app.command("unpin")
def versions_unpin(
    version: Version,
    reason: Reason,
    group: Group = "",
    actor: Actor = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Let a version's weights be pruned again."""
    _pin(version, False, reason, group, actor, dry_run, as_json)


def _pin(
    version: str, pinned: bool, reason: str, group: str, actor: str, dry_run: bool, as_json: bool
) -> None:
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    act = rollout.pin if pinned else rollout.unpin
    number = version_id(engine, owner.name, version)
    change = act(engine, number, actor=actor or user(), reason=reason, dry_run=dry_run)
    state = "pinned" if pinned else "not pinned"
    if as_json:
        print_json(change)
    elif not change.changed:
        print(f"version {number} is {state} already; nothing was changed")
    else:
        print(f"version {number} {'would be' if dry_run else 'is'} {state}")


def version_row(line: VersionLine, written: NotesAndTags | None = None) -> dict[str, Any]:
    version, served = line.version, line.served
    return {
        "id": version.id,
        "aliases": list(line.aliases),
        "source": version.source,
        "parent_id": version.parent_id,
        "created_at": version.created_at,
        "accept_length": served.accept_length if served else None,
        "ci_low": served.ci_low if served else None,
        "ci_high": served.ci_high if served else None,
        "requests": served.requests if served else 0,
        "replayed_accept_length": version.metrics.get("accept_length_after"),
        "weights": version.weights_sha256[:12],
        "weights_sha256": version.weights_sha256,
        "pinned": version.pinned,
        "note": version.note,
        "tags": list(written.tags) if written else [],
        "not_live": line.not_live.word if line.not_live else "",
        "why_not_live": line.not_live.reason if line.not_live else "",
    }
