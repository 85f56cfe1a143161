"""Versions: what there is, where it comes from, how it was judged, and what to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from aurora_sgl.rollout import status
from aurora_sgl.rollout.notes import NotesAndTags
from aurora_sgl.store.models import DrafterVersion, Evaluation
from aurora_sgl.store.queries.trends import ServedCounts

from .. import (
    charts,
    data,
    dialogs,
    lineage,
    links,
    live,
    login,
    staging,
    verdicts,
    version_notes,
    version_questions,
    words,
)
from ..context import Group, group, now
from ..parts import refreshing

CHOSEN = "version"
ROLES = {"live": "★ live", "previous": "◆ previous", "candidate": "▲ candidate"}


def show() -> None:
    st.title("Versions")
    here = group()
    versions = data.versions(here)
    if not versions:
        st.info(
            "There is no version yet. A server makes the first one when it starts: "
            "`aurora-sgl serve --model PATH`, or `make demo`. A drafter that was trained "
            "elsewhere comes in with `aurora-sgl versions import FOLDER`.",
            icon=":material/hourglass_empty:",
        )
        return
    _where(here)
    staging.panel(here)
    staging.buttons(here)
    aliases = data.aliases(here)
    ids = [version.id for version in versions]
    judged = data.evaluations_of(here, ids)
    served = data.served_by_version(here.url, tuple(ids))
    written = version_notes.read(here)
    fitting = version_notes.search(versions, written)
    # Only the open tab is drawn; what is chosen, with its buttons, stays near the top.
    table, tree = st.tabs(["All versions", "Lineage"], key="shown", on_change="rerun",
                          bind="query-params")  # fmt: skip
    if table.open:
        with table:
            _table(fitting, aliases, judged, served, written)
    if tree.open:
        with tree:
            _lineage(fitting, aliases, judged, served)
    chosen = _choose(ids, aliases)
    version = next(row for row in versions if row.id == chosen)
    _one(here, version, aliases, served.get(chosen))


@refreshing(live.LIVE)
def _where(here: Group) -> None:
    """What each server runs, by its own word, and the trial or watch that goes on."""
    servers = status.servers(here.engine, here.name)
    if not servers:
        st.caption("No server runs; a promotion reaches servers when they start.")
    else:
        _what_servers_run(servers)
    live.show_trial_and_watch(here)


def _what_servers_run(servers: Sequence[status.ServerStatus]) -> None:
    rows = [
        {
            "server": server.name,
            "runs": words.version(server.live_version_id),
            "hash of its weights": server.live_sha256[:16] or "not read back yet",
            "should run": words.version(server.wanted_version_id),
            "state": words.server_state(server),
        }
        for server in servers
    ]
    words.table("what servers run", rows, empty="")


def _choose(ids: Sequence[int], aliases: dict[str, int]) -> int:
    if st.session_state.get(CHOSEN) not in ids:
        asked = str(st.query_params.get(CHOSEN, ""))
        number = int(asked) if asked.isdecimal() and int(asked) in ids else None
        st.session_state[CHOSEN] = number or aliases.get("live", ids[-1])
    roles = {version: ROLES[name] for name, version in aliases.items()}
    chosen: int = st.selectbox(
        "Version", ids[::-1], key=CHOSEN, width=320,
        format_func=lambda id: f"{id}  {roles.get(id, '')}".strip(),
    )  # fmt: skip
    st.query_params[CHOSEN] = str(chosen)
    return chosen


# -- all of them --------------------------------------------------------------------------------


def _table(
    versions: Sequence[DrafterVersion],
    aliases: dict[str, int],
    judged: dict[int, Evaluation],
    served: dict[int, ServedCounts],
    written: dict[int, NotesAndTags],
) -> None:
    if not versions:
        st.caption("No version fits. Take a word away.")
        return
    roles = {version: ROLES[name] for name, version in aliases.items()}
    has_tags = any(one.tags for one in written.values())
    rows = []
    for version in versions[::-1]:
        evaluation, sums = judged.get(version.id), served.get(version.id, ServedCounts())
        of_people = written.get(version.id)
        tags = {"tags": list(of_people.tags) if of_people else []} if has_tags else {}
        rows.append(
            {
                "version": version.id,
                "is": f"{roles.get(version.id, '')}{' ◉ pinned' if version.pinned else ''}".strip(),
                **tags,
                "made": version.created_at,
                "from": version.parent_id or version.source,
                "replayed": evaluation.candidate_accept_length if evaluation else None,
                "verdict": _verdict(evaluation),
                "served": sums.accept_length,
                "95%": _interval(sums.interval),
                "requests": sums.requests,
                "note": version_notes.newest(version, of_people),
                "why not": verdicts.why_not(evaluation),
            }
        )
    frame = pd.DataFrame(rows).astype({"from": str})
    indices = {row["version"]: index for index, row in enumerate(rows)}

    def pick() -> None:
        picked = st.session_state["versions table"].selection.rows
        if picked:
            st.session_state[CHOSEN] = rows[picked[0]]["version"]

    st.dataframe(
        frame, hide_index=True, key="versions table", height=min(320, 38 + 35 * len(indices)),
        on_select=pick, placeholder=words.NONE,
        selection_mode="single-row", alt="all versions, newest first",
        column_config={
            "version": st.column_config.NumberColumn(width=62),
            "is": st.column_config.TextColumn(width=104),
            "tags": st.column_config.ListColumn(width=120),
            "made": words.time_column(),
            "from": st.column_config.TextColumn(width=60, help="Parent version, or its source"),
            "replayed": st.column_config.NumberColumn(
                format="%.3f", help="Accept length in the newest replay on held-out requests"
            ),
            "served": st.column_config.NumberColumn(
                format="%.3f", help="Accept length of all requests that it alone served"
            ),
            "requests": st.column_config.NumberColumn(format="localized"),
            "why not": st.column_config.TextColumn(help="Why its newest replay did not pass"),
        },
    )  # fmt: skip


def _verdict(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    sign = {"pass": "✔", "fail": "✖"}.get(evaluation.verdict, "?")
    return f"{sign} {evaluation.verdict}"


def _interval(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else ""


def _lineage(
    versions: Sequence[DrafterVersion],
    aliases: dict[str, int],
    judged: dict[int, Evaluation],
    served: dict[int, ServedCounts],
) -> None:
    roles = {version: name for name, version in aliases.items()}
    nodes = []
    for version in versions:
        evaluation, sums = judged.get(version.id), served.get(version.id, ServedCounts())
        replayed = evaluation.candidate_accept_length if evaluation else None
        length = replayed if replayed is not None else sums.accept_length
        hover = (
            f"version {version.id}, from {version.parent_id or version.source}<br>"
            f"replayed {words.number(replayed, 3)} {_verdict(evaluation)}<br>"
            f"served {words.length(sums.accept_length, sums.interval)}"
        )
        nodes.append((version.id, version.parent_id, version.created_at, length,
                      roles.get(version.id, ""), hover))  # fmt: skip
    if not nodes:
        st.caption("No version fits. Take a word away.")
        return
    if not any(node[3] is not None for node in nodes):
        st.caption("Drawn once a version was replayed or has served requests.")
        return
    figure = lineage.figure_of(nodes, st.session_state.get(CHOSEN))
    charts.show(figure, "lineage", "versions by time and accept length, joined to their parents")


# -- one of them --------------------------------------------------------------------------------


def _one(
    here: Group, version: DrafterVersion, aliases: dict[str, int], served: ServedCounts | None
) -> None:
    live = aliases.get("live", 0)
    role = next((ROLES[name] for name, of in aliases.items() if of == version.id), "")
    st.subheader(f"Version {version.id}  {role}".strip(), divider="gray")
    evaluations = data.evaluations(here, version.id)
    if login.is_operator():
        _buttons(here, version, aliases)
    else:
        st.caption("You may look. Promote, roll back, pin and export need an operator.")
    _compare(version, aliases)
    left, right = st.columns([2, 3], gap="large")
    with left:
        _live_on(here, version.id)
        _facts(here, version, served)
        version_notes.show(here, version)
    with right:
        _judged(here, evaluations, live)
        _history(here, version)


def _compare(version: DrafterVersion, aliases: dict[str, int]) -> None:
    """A link to this version beside the live one; of that one beside what it came from."""
    live = aliases.get("live")
    others = (live, aliases.get("previous"), version.parent_id)
    other = next((one for one in others if one not in (None, version.id)), None)
    if other is None:
        return
    pair = {"a": str(other), "b": str(version.id)}
    links.to("compare", f"Compare with version {other}", "compare", pair)


def _buttons(here: Group, version: DrafterVersion, aliases: dict[str, int]) -> None:
    live, gone = aliases.get("live", 0), version.pruned_at is not None
    questions = version_questions.Questions(here, version.id, live)
    with st.container(horizontal=True):
        dialogs.button(
            "Promote", "publish", questions.promote, key="promote", primary=True,
            disabled=version.id == live or gone,
            help="It is live already" if version.id == live else "Its weights are gone" if gone
            else f"Put version {version.id} live",
        )  # fmt: skip
        dialogs.button(
            "Roll back", "undo", questions.rollback, key="rollback",
            disabled=version.id != live or "previous" not in aliases,
            help="Only the live version is rolled back" if version.id != live
            else "There is no earlier one" if "previous" not in aliases
            else f"Go back to version {aliases['previous']}",
        )  # fmt: skip
        dialogs.button(
            "Unpin" if version.pinned else "Pin", "keep_off" if version.pinned else "keep",
            questions.unpin if version.pinned else questions.pin, key="pin", disabled=gone,
            help="Leave its weights to pruning" if version.pinned
            else "Keep its weights whatever is pruned",
        )  # fmt: skip
        dialogs.button("Export", "download", questions.export, key="export", disabled=gone,
                       help="Its folder, as any SGLang loads it")  # fmt: skip


@refreshing(live.LIVE)
def _live_on(here: Group, version_id: int) -> None:
    servers = [row.name for row in status.servers(here.engine, here.name)
               if row.live_version_id == version_id]  # fmt: skip
    words.facts("where it is live", {"live on": ", ".join(servers) or "no server"})


def _facts(here: Group, version: DrafterVersion, served: ServedCounts | None) -> None:
    run = data.run_of(here, version.training_run_id)
    facts: dict[str, Any] = {
        "made": words.time(version.created_at),
        "from": words.version(version.parent_id) if version.parent_id else version.source,
    }
    if run is not None:
        facts["training run"] = (
            f"{run.id}: {run.objective}, {run.requests:,} requests, {run.tokens:,} tokens"
        )
        facts["data window"] = words.between(run.window_start, run.window_end)
    if served is not None:
        facts["served"] = (
            f"{words.length(served.accept_length, served.interval)} over "
            f"{served.requests:,} requests"
        )
    facts["target"] = f"{version.target_model} {version.target_revision}".strip()
    facts["weights"] = version.weights_sha256[:32]
    facts["kept"] = (
        f"no: deleted {words.ago(version.pruned_at)}" if version.pruned_at
        else "always (pinned)" if version.pinned else "until pruned"
    )  # fmt: skip
    words.facts(f"version {version.id}", facts)


def _judged(here: Group, evaluations: Sequence[Evaluation], live: int) -> None:
    st.markdown("**How it was judged**")
    rows_of_all = [row for row in evaluations if not row.domain]
    rows = [
        {
            "when": row.created_at,
            "how": row.kind,
            "against": words.version(row.baseline_id) + (" (live)" if row.baseline_id == live
                                                         and live else ""),
            "requests": row.requests,
            "accept length": f"{words.number(row.baseline_accept_length)} → "
            f"{words.number(row.candidate_accept_length)}",
            "difference": words.difference(row.difference, row.ci_low, row.ci_high),
            "interval": verdicts.level(row),
            "verdict": _verdict(row),
        }
        for row in rows_of_all[:20]
    ]  # fmt: skip
    words.table("evaluations", rows, numbers=("requests",),
                empty="It was never compared with another version.")  # fmt: skip
    for row in rows_of_all[:1]:
        for line in verdicts.told(row):
            words.say(line, small=True)
        domains = version_questions.by_domain(row)
        if domains:
            words.table("by domain", domains, numbers=("requests",), empty="", whole=False)
        if now() - row.created_at > version_questions.OLD:
            st.caption(f"The newest of these is {words.age(row.created_at)} old.")
    st.caption(words.literal(f"Now {data.held_out(here.url, here.name)}."))


def _history(here: Group, version: DrafterVersion) -> None:
    st.markdown("**When it went live, and when it left**")
    rows = [
        {
            "when": row.created_at,
            "what": f"{'▲' if row.action == 'promote' else '▼'} {row.action}",
            "live before": words.version(row.previous_version_id),
            "live after": words.version(row.version_id),
            "who": row.actor,
            "why": row.reason,
        }
        for row in data.deployments_of(here, version.id)[:20]
    ]
    words.table("history", rows, empty="It was never live.")
