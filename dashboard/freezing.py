"""Freezes as operators see them: which go on or are to come, how one is made and lifted."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import streamlit as st

from aurora_sgl.rollout import freezes
from aurora_sgl.store.models import FreezeWindow

from . import actions, dialogs, login, words
from .context import Group, local, now, zone
from .dialogs import Question


def part(here: Group) -> None:
    """What is frozen now or will be; a button for another one."""
    st.subheader("Freezes")
    moment = now()
    every = freezes.freezes(here.engine, here.name, limit=200)
    due = [row for row in every if row.lifted_at is None and row.ends_at > moment][::-1]
    if not due:
        st.caption("None: what passes may go live by itself.")
    for row in due:
        with st.container(horizontal=True, vertical_alignment="center"):
            with st.container():
                begun = row.starts_at <= moment
                st.markdown("**❄ Frozen**" if begun else "**To come**")
                words.say(
                    words.between(row.starts_at, row.ends_at), f", {row.actor}: {row.reason}",
                    small=True,
                )  # fmt: skip
            if login.is_operator():
                dialogs.button(
                    "Lift", "lock_open", Lift(here, row.id).ask, key=f"lift {row.id}",
                    help="End it now" if begun else "Call it off",
                )  # fmt: skip
    if login.is_operator():
        dialogs.button(
            "Freeze", "ac_unit", Freeze(here).ask, key="freeze",
            help="Let nothing go live by itself for a time",
        )  # fmt: skip


@dataclass(frozen=True)
class Freeze:
    """A new one."""

    here: Group

    def ask(self) -> Question:
        return Question("Freeze", "Freeze", self._tell, self._act, "release week")

    def _tell(self) -> dict[str, Any]:
        st.write(
            "From one moment to another nothing goes live by itself. You may still promote, and a "
            "version that turns out worse is still rolled back."
        )
        begin = local(now()).replace(second=0, microsecond=0, tzinfo=None)
        left, right = st.columns(2)
        help = words.zone_help()
        with left:
            since = st.datetime_input("From", begin, key="freeze from", help=help)
        with right:
            until = st.datetime_input("To", begin + timedelta(days=1), key="freeze to", help=help)
        return {"since": since, "until": until}

    def _act(self, reason: str, *, since: datetime, until: datetime) -> str:
        row = actions.freeze(self.here, _moment(since), _moment(until), reason=reason)
        return f"Nothing goes live by itself until {words.both(row.ends_at)}."


@dataclass(frozen=True)
class Lift:
    """The end of one before its time."""

    here: Group
    freeze_id: int

    def ask(self) -> Question:
        return Question("Lift a freeze", "Lift", self._tell, self._act, "the release is out")

    def _tell(self) -> dict[str, Any]:
        row: FreezeWindow | None = next(
            (one for one in freezes.freezes(self.here.engine, self.here.name)
             if one.id == self.freeze_id), None
        )  # fmt: skip
        if row is not None:
            words.say(words.between(row.starts_at, row.ends_at), f", {row.actor}: {row.reason}")
        st.write("What passed the gate may go live by itself again at once.")
        return {}

    def _act(self, reason: str) -> str:
        actions.lift(self.here, self.freeze_id, reason=reason)
        return "The freeze is lifted."


def _moment(chosen: datetime) -> datetime:
    """Of the viewer's clock; an hour that his clock has twice is the first of them."""
    return chosen.replace(tzinfo=zone(), fold=0)
