"""What ``db prune`` and ``db limits`` do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from aurora_sgl.cli.shared import open_group, open_store, print_rows, user
from aurora_sgl.console import print_json, print_table
from aurora_sgl.errors import AuroraError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from aurora_sgl.store.models import DeploymentGroup
    from aurora_sgl.store.retention import PruneReport

#: What of several groups' reports is added up; the rest stands under each group.
_SUMS = ("events", "requests", "traces", "trace_bytes", "minutes", "hours")
_LISTS = ("partitions", "emptied", "not_ours", "versions")


def prune_groups(
    group: str, values: Mapping[str, int], *, with_weights: bool, dry_run: bool, as_json: bool
) -> None:
    """Prune one group, or each by its own limits. ``values``: instead of those, for one group."""
    engine, groups = _groups(group)
    if values and len(groups) > 1:
        names = ", ".join(repr(one.name) for one in groups)
        raise AuroraError(f"say of which group with --group (there is: {names})")
    reports = {
        one.name: _prune_one(engine, one.id, values, with_weights, dry_run) for one in groups
    }
    totals = _total(reports)
    if as_json:
        parts = {name: report.as_json() for name, report in reports.items()}
        print_json({"dry_run": dry_run, **totals, "groups": parts})
        return
    rows = [{"name": name, "value": value} for name, value in totals.items()]
    print_table("would go" if dry_run else "gone", {"": "name", " ": "value"}, rows)
    if totals["emptied"]:
        print("emptied: somebody reads these; their rows are gone, the tables go another time")
    if totals["not_ours"]:
        print("not_ours: their rows are gone; their owner drops them with `aurora-sgl db upgrade`")


def _groups(name: str) -> tuple[Engine, list[DeploymentGroup]]:
    from aurora_sgl import store
    from aurora_sgl.store import queries

    if name:
        engine, one = open_group(name)
        return engine, [one]
    engine = open_store()
    with store.session(engine, write=False) as s:
        return engine, list(queries.groups.groups(s))


def _prune_one(
    engine: Engine, group_id: int, values: Mapping[str, int], with_weights: bool, dry_run: bool
) -> PruneReport:
    """A round by the group's own limits stands in the store as those of the scheduler do."""
    from aurora_sgl import store
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.store import queries
    from aurora_sgl.store.retention import prune

    with store.session(engine, write=False) as s:
        limits = queries.limits.limits(s, group_id).changed(values)
    if dry_run or values:
        return prune(
            engine, ArtifactRoot(), group_id, limits, with_weights=with_weights, dry_run=dry_run
        )
    with store.session(engine) as s:
        run = queries.prune_runs.start(s, group_id, user())
    report = prune(engine, ArtifactRoot(), group_id, limits, with_weights=with_weights)
    with store.session(engine) as s:
        queries.prune_runs.finish(s, run.id, report.as_json())
    return report


def _total(reports: Mapping[str, PruneReport]) -> dict[str, object]:
    sums, lists = Counter[str](), {name: list[object]() for name in _LISTS}
    for report in reports.values():
        sums.update({name: getattr(report, name) for name in _SUMS})
        for name in _LISTS:
            lists[name] += getattr(report, name)
    return {**{name: sums[name] for name in _SUMS}, **lists}


def show_limits(group: str, *, as_json: bool) -> None:
    from aurora_sgl import rollout

    engine, owner = open_group(group)
    rows = [vars(each) for each in rollout.limits.read(engine, owner.name)]
    columns = {"limit": "name", "value": "value", "of what": "meaning", "set by": "set_by"}
    print_rows(f"what group {owner.name!r} keeps", columns, rows, as_json)


def change_limits(
    group: str, pairs: list[str], actor: str, reason: str, *, dry_run: bool, as_json: bool
) -> None:
    from aurora_sgl import limits, rollout

    engine, owner = open_group(group)
    change = rollout.limits.change(
        engine,
        owner.name,
        limits.read(pairs),
        actor=actor or user(),
        reason=reason,
        dry_run=dry_run,
    )
    if as_json:
        print_json(change)
        return
    verb = "would be" if dry_run else "is"
    for name, value in change.after.items():
        before = change.before[name]
        print(f"{name} {verb} {value:,} (before: {'not set' if before is None else f'{before:,}'})")
    if not change.after:
        print("nothing changes: the limits are so already")
