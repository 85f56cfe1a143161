"""A staged rollout as operators see it: how far it is, what to do with it, and how one begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import streamlit as st

from aurora_sgl.errors import Refused
from aurora_sgl.rollout import stages, status
from aurora_sgl.rollout.stages import StageStatus

from . import actions, dialogs, login, words
from .context import Group
from .dialogs import Question
from .parts import refreshing

ALL, SOME = "All servers", "Some servers first"
SIGNS = {"pass": "✔", "bad": "✖", "fail": "✖", "empty": "?"}


@refreshing(2.0)
def panel(here: Group) -> None:
    """The stage that is open, with its windows so far; nothing without one."""
    look = stages.current(here.engine, here.name)
    if look is None or not look.is_open:
        return
    one = look.stage
    with st.container(border=True):
        st.markdown(f"**Staged: version {one.version_id}**")
        words.say(
            f"It runs on {', '.join(one.servers)} since ", words.time(one.started_at),
            f", by {one.actor}: {one.reason}. The others run version {one.baseline_id}.",
            small=True,
        )  # fmt: skip
        share = 1.0 if one.status == "passed" else len(one.windows) / look.planned
        st.progress(min(1.0, share), text=words.literal(_sentence(look.sentence)))
        words.table(
            "windows of the stage", rows_of(look), numbers=("requests",), empty=_empty(look)
        )


def buttons(here: Group) -> None:
    """What an operator can do about the stage that is open. Not part of the panel, which draws
    itself again alone: a dialog is opened by its page."""
    look = stages.current(here.engine, here.name)
    if look is not None and look.is_open and login.is_operator():
        _buttons(here, look)


def rows_of(look: StageStatus) -> list[dict[str, object]]:
    """Windows for a table."""
    return [
        {
            "window": window["number"],
            "requests": window["requests"],
            "accept length": words.number(window["accept_length"]),
            "the others": words.number(window["expected_accept_length"]),
            "tokens/s": words.number(window["tokens_per_second"], 1),
            "the others' ": words.number(window["expected_tokens_per_second"], 1),
            "verdict": f"{SIGNS.get(window['verdict'], '')} {window['verdict']}",
            "why": window["reason"],
        }
        for window in look.stage.windows
    ]


def _empty(look: StageStatus) -> str:
    return f"No window is over yet; {look.planned} good ones are needed."


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _buttons(here: Group, look: StageStatus) -> None:
    questions = StageQuestions(here, look.stage.id)
    with st.container(horizontal=True):
        dialogs.button(
            "Continue to the rest", "arrow_forward", questions.go_on, key="stage go on",
            primary=look.stage.status == "passed",
            help=f"Put version {look.stage.version_id} live on all servers",
        )  # fmt: skip
        dialogs.button(
            "Abort", "undo", questions.abort, key="stage abort",
            help=f"Take it off {', '.join(look.stage.servers)}",
        )  # fmt: skip


@dataclass(frozen=True)
class StageQuestions:
    """``stage_id``: the one that the page showed."""

    here: Group
    stage_id: int

    def go_on(self) -> Question:
        return Question(
            "Continue the staged rollout", "Continue", self._tell_go_on, self._go_on,
            "as good as the others",
        )  # fmt: skip

    def abort(self) -> Question:
        return Question(
            "Abort the staged rollout", "Abort", self._tell_abort, self._abort, "slower at night"
        )

    def _look(self) -> StageStatus:
        look = stages.current(self.here.engine, self.here.name)
        if look is None or look.stage.id != self.stage_id or not look.is_open:
            why = f": {look.sentence}" if look is not None else ""
            raise Refused(f"this stage is over{why}")
        return look

    def _tell_go_on(self) -> dict[str, Any]:
        look = self._look()
        st.write(
            f"Version {look.stage.version_id} goes live on all servers, and a watch over it begins."
        )
        words.table(
            "windows of the stage", rows_of(look), numbers=("requests",), empty=_empty(look)
        )
        force = False
        if look.stage.status != "passed":
            st.warning(
                words.literal(f"It has not passed: {look.sentence}."), icon=":material/warning:"
            )
            force = st.checkbox("Continue all the same")
        return {"force": force}

    def _go_on(self, reason: str, *, force: bool) -> str:
        self._look()
        change = actions.continue_stage(self.here, reason=reason, force=force)
        return (
            f"Version {change.version_id} is live (generation {change.generation}). "
            "The other servers follow within seconds; a watch over it has begun."
        )

    def _tell_abort(self) -> dict[str, Any]:
        look = self._look()
        servers = ", ".join(words.literal(name) for name in look.stage.servers)
        st.write(
            f"{servers} go back to version {look.stage.baseline_id}, between two steps and without "
            "a pause. What is live does not change."
        )
        return {}

    def _abort(self, reason: str) -> str:
        self._look()
        ended = actions.abort_stage(self.here, reason=reason)
        return f"Version {ended.stage.version_id} is taken back; its servers follow within seconds."


@dataclass(frozen=True)
class FirstServers:
    """Where an operator wants a version first. ``names`` empty: everywhere at once; ``doubt``: what
    speaks against beginning there, which he may overrule."""

    names: str = ""
    goes_on: bool = False
    doubt: str = ""


def choose(here: Group, version_id: int, live: int) -> FirstServers:
    """Ask where; what some servers would be is said at once. Raises ``Refused`` for what can't be,
    whoever wants it."""
    running = [row.name for row in status.servers(here.engine, here.name) if not row.silent]
    if len(running) < 2 or not live:
        return FirstServers()
    where = st.radio("Where", (ALL, SOME), horizontal=True)
    if where == ALL:
        return FirstServers()
    names = st.text_input(
        "Servers", "1", help="A number, a share such as 25%, or names with commas between them"
    )
    goes_on = st.checkbox("Then to the rest by itself, if it passes there")
    try_it = partial(
        actions.stage, here, version_id, live, names, reason="dry run", goes_on=goes_on,
        dry_run=True,
    )  # fmt: skip
    plan = try_it(force=True)
    words.say(
        f"{', '.join(plan.servers)} first, judged by live traffic against "
        f"{', '.join(plan.others)} at the same time.", small=True,
    )  # fmt: skip
    try:
        try_it()
    except Refused as doubt:
        return FirstServers(names, goes_on, str(doubt))
    return FirstServers(names, goes_on)
