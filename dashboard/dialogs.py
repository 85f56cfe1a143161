"""Asking an operator: what will change, on what evidence, and why.

A button remembers what the page showed as live when it was drawn; the action is refused when
something else is live by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import streamlit as st
from sqlalchemy.exc import DBAPIError

from aurora_sgl.errors import AuroraError

from . import actions, words
from .context import in_words
from .parts import private

ASKED, DONE = "asked", "done"


@dataclass(frozen=True)
class Question:
    """``tell`` draws what will change and the evidence; ``act`` takes the reason and what
    ``tell`` returned, and returns what to say afterwards."""

    title: str
    button: str
    tell: Callable[[], Mapping[str, Any]]
    act: Callable[..., str]
    example: str  # of a reason
    label: str = "Reason"
    help: str = "Kept with the change, for whoever asks later."
    needed: bool = True  # else it may be left empty


def button(
    label: str, icon: str, make: Callable[[], Question], *, key: str, help: str = "",
    disabled: bool = False, primary: bool = False, quiet: bool = False,
) -> None:  # fmt: skip
    """A button that asks; ``make`` holds what the page showed when it was drawn."""
    type: Literal["primary", "secondary", "tertiary"] = "tertiary" if quiet else "secondary"
    st.button(
        label, icon=f":material/{icon}:", key=key, help=help or None, disabled=disabled,
        on_click=_ask, args=(make,), type="primary" if primary else type,
    )  # fmt: skip


def _ask(make: Callable[[], Question]) -> None:
    st.session_state[ASKED] = make


def open_asked() -> None:
    """Open the dialog that was asked for in the last click; the shell does, above each page."""
    done = st.session_state.pop(DONE, None)
    if done:
        st.success(words.literal(done), icon=":material/check_circle:")
    make = st.session_state.pop(ASKED, None)
    if make is None:
        return
    question: Question = make()
    st.dialog(question.title, width="medium")(private(_dialog))(question)


def _dialog(question: Question) -> None:
    try:
        actions.operator()
        extra = question.tell()
    except (AuroraError, DBAPIError) as error:
        st.error(words.literal(in_words(error)), icon=":material/block:")
        st.write("Nothing was changed. Close this, look at the page again, and decide anew.")
        return
    with st.form("why", border=False, enter_to_submit=True):
        reason = st.text_input(
            question.label, placeholder=question.example, max_chars=500, help=question.help,
        )  # fmt: skip
        agreed = st.form_submit_button(question.button, type="primary")
    if not agreed:
        return
    if question.needed and not reason.strip():
        missing = (
            "Say why first." if question.label == "Reason" else f"{question.label} is missing."
        )
        st.error(missing, icon=":material/edit:")
        return
    try:
        done = question.act(reason.strip(), **extra)
    except (AuroraError, DBAPIError) as error:
        st.error(words.literal(in_words(error)), icon=":material/block:")
        return
    if done:
        st.session_state[DONE] = done
        st.rerun()
