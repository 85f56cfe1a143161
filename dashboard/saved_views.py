"""Saved views: pages as somebody looked at them, as links beside every page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st

from aurora_sgl import store
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.store import queries
from aurora_sgl.store.models import SavedView

from . import actions, addresses, dialogs, login, words
from .addresses import Address
from .context import Group
from .dialogs import Question


def show(here: Group, page: str, pages: Sequence[str]) -> None:
    """In the sidebar. ``page``: the one that is looked at; ``pages``: all that there are."""
    rows = read(here)
    operator = login.is_operator()
    if not rows and not operator:
        return
    st.markdown("**Saved views**")
    words.links("saved views", [link for row in rows if (link := _link(row, pages))])
    if not operator:
        return
    questions = ViewQuestions(here, page, pages)
    with st.container(horizontal=True, gap="small"):
        dialogs.button("Save view", "bookmark_add", questions.save, key="save view",
                       quiet=True, help="Keep this page with its filters under a name")  # fmt: skip
        if rows:
            dialogs.button("Delete", "bookmark_remove", questions.delete, key="delete view",
                           quiet=True, help="Delete a saved view")  # fmt: skip


def read(here: Group) -> Sequence[SavedView]:
    with store.session(here.engine, write=False) as s:
        return queries.saved_views.saved_views(s, here.id)


def _link(row: SavedView, pages: Sequence[str]) -> words.Link | None:
    """``None`` for what is no address of ours: another program wrote it, or another release."""
    try:
        address = Address.of(row.page, row.query, pages)
    except AuroraError:
        return None
    return words.Link(row.name, address.href, f"{row.page}, saved by {row.actor}")


@dataclass(frozen=True)
class ViewQuestions:
    here: Group
    page: str
    pages: Sequence[str]

    def save(self) -> Question:
        # Asked for before the page below is drawn: its parameters are those that its reader sees.
        asked = SaveThis(self.here, self.page, addresses.parameters(), self.pages)
        return Question(
            "Save this view", "Save", asked.tell, asked.act, "code since the last promotion",
            label="Name", help="Everybody who may look at this group sees it.",
        )  # fmt: skip

    def delete(self) -> Question:
        return Question(
            "Delete a saved view", "Delete", self._tell_delete, self._delete, "nobody looks at it"
        )

    def _tell_delete(self) -> dict[str, Any]:
        rows = {row.id: row for row in read(self.here)}
        if not rows:
            raise Refused("there is no saved view any more")
        chosen = st.selectbox("View", list(rows), format_func=lambda id: rows[id].name)
        row = rows[chosen]
        words.say(f"Of the page {row.page.capitalize()}, saved by {row.actor} ",
                  words.since(row.created_at), ".")  # fmt: skip
        return {"view_id": chosen}

    def _delete(self, reason: str, *, view_id: int) -> str:
        return f"The view {actions.delete_view(self.here, view_id, reason=reason)} is deleted."


@dataclass(frozen=True)
class SaveThis:
    """A page as it was when the button was pressed."""

    here: Group
    page: str
    pairs: tuple[tuple[str, str], ...]
    pages: Sequence[str]

    @property
    def address(self) -> Address:
        return Address.checked(self.page, self.pairs, self.pages)

    def tell(self) -> dict[str, Any]:
        address = self.address
        rows = {"page": address.page.capitalize()}
        for key, value in address.pairs:
            rows[key] = f"{rows[key]}, {value}" if key in rows else value
        words.facts("view", rows)
        if not address.pairs:
            st.caption("As it is when it is opened: nothing was chosen on it.")
        return {}

    def act(self, name: str) -> str:
        actions.save_view(self.here, name, self.address)
        return f"The view {name} is saved."
