"""Audit: every deployment and switch change: who, when, why, before, after, on what evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pandas as pd
import streamlit as st

from aurora_sgl.rollout import status
from aurora_sgl.store.models import Audit, Deployment

from .. import data, words
from ..context import Group, group
from ..parts import refreshing

LIMIT = 2000
SIGNS = {
    "promote": "▲", "rollback": "▼", "switch": "◐", "pin": "◉", "unpin": "○", "freeze": "❄",
    "lift": "○", "stage start": "△", "stage pass": "✔", "stage continue": "▲",
    "stage abort": "▽", "stage fail": "✖", "note": "✎", "tag": "✎", "untag": "✎",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    moment: datetime
    who: str
    action: str
    what: str
    why: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""


def show() -> None:
    st.title("Audit")
    _page()


@refreshing(None)
def _page() -> None:
    all_entries = entries(group())
    if not all_entries:
        st.info(
            "Nothing was promoted, rolled back or switched yet. Whatever is done here, on the "
            "command line or by the scheduler stands here afterwards, and can't be changed.",
            icon=":material/hourglass_empty:",
        )
        return
    shown = _chosen(all_entries)
    if not shown:
        st.caption(f"None of the {len(all_entries):,} entries fits. Take a filter away.")
        return
    picked = _table(shown)
    if len(all_entries) >= LIMIT:
        st.caption(f"The newest {LIMIT:,}; the SQL page has all: v_deployment_history and audit.")
    if picked is None:
        st.caption("Below: the newest. Choose another one in the table.")
    _one(shown[picked or 0])


def entries(here: Group) -> list[Entry]:
    """Deployments and all else, newest first."""
    rows = [_of_deployment(row) for row in data.deployments(here, LIMIT)]
    rows += [_of_audit(row) for row in status.audit(here.engine, here.name, limit=LIMIT)]
    return sorted(rows, key=lambda entry: entry.moment, reverse=True)[:LIMIT]


def _of_deployment(row: Deployment) -> Entry:
    before = words.version(row.previous_version_id) if row.previous_version_id else "nothing"
    what = f"{before} → {words.version(row.version_id)}"
    evidence = dict(row.evidence)
    if row.evaluation_id is not None:
        evidence = {"evaluation": row.evaluation_id, **evidence}
    return Entry(row.created_at, row.actor, row.action, what, row.reason, row.before, row.after,
                 evidence, f"generation {row.generation}")  # fmt: skip


def _of_audit(row: Audit) -> Entry:
    what = row.subject.replace("_", " ")
    if row.action == "switch":
        what += f": {_on(row.before)} → {_on(row.after)}"
    return Entry(row.created_at, row.actor, row.action.replace("_", " "), what, row.reason,
                 row.before, row.after, {}, f"entry {row.id}")  # fmt: skip


def _on(state: Mapping[str, Any]) -> str:
    return "on" if state.get("on") else "off"


def _chosen(all_entries: list[Entry]) -> list[Entry]:
    left, middle, right = st.columns([2, 2, 3])
    actions = left.multiselect("What", sorted({entry.action for entry in all_entries}),
                               placeholder="everything", key="what",
                               bind="query-params")  # fmt: skip
    people = middle.multiselect("Who", sorted({entry.who for entry in all_entries}),
                                placeholder="everybody", key="who",
                                bind="query-params")  # fmt: skip
    text = right.text_input("Why, or which version", placeholder="words of the reason", key="why",
                            bind="query-params")  # fmt: skip
    return [
        entry
        for entry in all_entries
        if (not actions or entry.action in actions)
        and (not people or entry.who in people)
        and text.casefold().strip() in f"{entry.why} {entry.what}".casefold()
    ]


def _table(shown: list[Entry]) -> int | None:
    """The row that was chosen."""
    rows = [
        {
            "when": entry.moment,
            "who": entry.who,
            "what": f"{SIGNS.get(entry.action, '·')} {entry.action}",
            "of": entry.what,
            "why": entry.why,
        }
        for entry in shown
    ]
    event = st.dataframe(
        pd.DataFrame(rows), hide_index=True, key="audit table", on_select="rerun",
        selection_mode="single-row", height=min(420, 38 + 35 * len(rows)),
        alt="audit, newest first",
        column_config={
            "when": words.time_column(),
            "who": st.column_config.TextColumn(width=140),
            "what": st.column_config.TextColumn(width=110),
            "of": st.column_config.TextColumn(width=220),
        },
    )  # fmt: skip
    picked = event.selection.rows
    return picked[0] if picked and picked[0] < len(shown) else None


def _one(entry: Entry) -> None:
    st.subheader(words.literal(f"{entry.action.capitalize()}: {entry.what}"), divider="gray")
    left, right = st.columns(2, gap="large")
    with left:
        words.facts(
            "entry",
            {
                "when": words.time(entry.moment),
                "who": entry.who,
                "why": entry.why,
                "number": entry.key,
            },
        )
        st.markdown("**Before and after**")
        keys = sorted(entry.before.keys() | entry.after.keys())
        rows = [
            {
                "": "state" if key == "on" else key,
                "before": _text(entry.before.get(key)),
                "after": _text(entry.after.get(key)),
            }
            for key in keys
        ]
        words.table("before and after", rows, empty="Nothing that was live changed.")
    with right:
        st.markdown("**Evidence shown at that moment**")
        if entry.evidence:
            words.facts("evidence", {str(k): _text(v) for k, v in entry.evidence.items()})
        else:
            st.caption("None was kept.")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)
