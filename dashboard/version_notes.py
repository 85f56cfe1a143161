"""Notes and tags on the page Versions: what people wrote, how versions are found by it, and the
forms to write more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st
from sqlalchemy.exc import DBAPIError

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout import notes
from aurora_sgl.rollout.notes import NotesAndTags
from aurora_sgl.store.models import DrafterVersion

from . import actions, login, words
from .context import Group, in_words
from .parts import refreshing

SEARCH, DONE, WRITTEN = "search", "just written", "times written"


def read(here: Group) -> dict[int, NotesAndTags]:
    """By version."""
    with store.session(here.engine, write=False) as s:
        return notes.of_group(s, here.id)


def search(
    versions: Sequence[DrafterVersion], written: Mapping[int, NotesAndTags]
) -> Sequence[DrafterVersion]:
    """Those that fit what was typed, which the page's address keeps."""
    text = st.text_input(
        "Search", key=SEARCH, bind="query-params", width=420, max_chars=200,
        placeholder='tag:prod, words of a note, "a phrase", a number', icon=":material/search:",
        help="Everything that is typed must fit: tag:NAME, a version's number, or words of its "
        "tags, notes and source.",
    )  # fmt: skip
    fitting = notes.search(text, versions, written)
    if len(fitting) < len(versions):
        st.caption(f"{len(fitting):,} of {len(versions):,} versions fit.")
    return fitting


def newest(version: DrafterVersion, written: NotesAndTags | None) -> str:
    """The note that a table has room for."""
    return written.notes[-1].text if written and written.notes else version.note


def show(here: Group, version: DrafterVersion) -> None:
    st.markdown("**Notes and tags**")
    _written(here, version)
    if login.is_operator():
        _forms(here, version.id)


@refreshing(5.0)
def _written(here: Group, version: DrafterVersion) -> None:
    one = read(here).get(version.id, NotesAndTags())
    if one.tags:
        words.chips("tags", one.tags)
    rows = [(words.joined(version.created_at, ", when it was made"), version.note)]
    rows = [row for row in rows if row[1]]
    rows += [(words.joined(row.actor, ", ", row.created_at), row.text) for row in one.notes]
    if rows:
        words.remarks("notes", rows)
    elif not one.tags:
        st.caption("Nobody wrote anything about it yet.")


def _forms(here: Group, version_id: int) -> None:
    """What is typed belongs to the version below which it is typed; once it is written down the
    fields are others, and empty."""
    done = st.session_state.pop(DONE, "")
    if done:
        st.caption(f"✔ {words.literal(done)}")
    which = f"{version_id} {st.session_state.get(WRITTEN, 0)}"
    with st.form("note", border=False):
        text = st.text_area(
            "Note", key=f"note {which}", height=68, max_chars=notes.LONGEST,
            placeholder="slow on long prompts",
        )  # fmt: skip
        noted = st.form_submit_button("Add note", icon=":material/add_comment:")
    with st.form("tags", border=False):
        names = st.text_input(
            "Tags", key=f"tags {which}", placeholder="prod quantised", max_chars=400,
            help="Words of letters a-z, digits, dots, hyphens and underscores, with spaces "
            "between them",
        )  # fmt: skip
        with st.container(horizontal=True, gap="small"):
            given = st.form_submit_button("Add tags", icon=":material/label:")
            taken = st.form_submit_button("Take off", icon=":material/label_off:")
    try:
        if noted:
            actions.add_note(here, version_id, text or "")
            _over("Noted.")
        elif given or taken:
            change = actions.change_tags(here, version_id, (names or "").split(), given)
            _over(f"Tags: {', '.join(change.tags) or 'none'}.")
    except (AuroraError, DBAPIError) as error:
        st.error(words.literal(in_words(error)), icon=":material/block:")


def _over(done: str) -> None:
    """The page again, with what was written."""
    st.session_state[DONE] = done
    st.session_state[WRITTEN] = st.session_state.get(WRITTEN, 0) + 1
    st.rerun()
