"""Training: what ran, what came of it, what stands in the way; start a run, turn the switches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from aurora_sgl.errors import Refused
from aurora_sgl.rollout import run_progress
from aurora_sgl.rollout.run_progress import RunProgress
from aurora_sgl.rollout.switches import AUTO_PROMOTE, LEARNING, SwitchState
from aurora_sgl.rollout.switches import read as read_switches
from aurora_sgl.store.models import TrainingRun

from .. import actions, charts, data, dialogs, freezing, live, login, trainings, words
from ..context import Group, group, now
from ..dialogs import Question
from ..parts import refreshing

LIMIT = 300
CHOSEN = "run"
STATES = {"succeeded": "✔ succeeded", "failed": "✖ failed", "skipped": "○ skipped",
          "running": "▶ running"}  # fmt: skip
NAMES = {LEARNING: "Learning", AUTO_PROMOTE: "Automatic promotion"}
MEANINGS = {
    LEARNING: "Without it no training run goes on and no hidden states are kept.",
    AUTO_PROMOTE: "Without it nothing goes live by itself.",
}


def show() -> None:
    st.title("Training")
    here = group()
    left, right = st.columns([2, 3], gap="large")
    with left:
        _switches(here)
        freezing.part(here)
    with right:
        _going_on(here)
    _runs(here)


# -- switches and the run that goes on ----------------------------------------------------------


def _switches(here: Group) -> None:
    st.subheader("Switches")
    may = login.is_operator()
    for switch in read_switches(here.engine, here.name):
        with st.container(horizontal=True, vertical_alignment="center"):
            with st.container():
                st.markdown(f"**{NAMES[switch.name]}: {'✔ on' if switch.on else '✖ off'}**")
                _last_change(switch)
            if may:
                question = Turn(here, switch.name, switch.on)
                dialogs.button(
                    "Switch off" if switch.on else "Switch on", "toggle_off" if switch.on
                    else "toggle_on", question.ask, key=f"turn {switch.name}",
                    help=MEANINGS[switch.name],
                )  # fmt: skip
    if not may:
        st.caption("Switching, and starting a run, need an operator.")


def _last_change(switch: SwitchState) -> None:
    if switch.updated_at is None:
        st.caption(f"Never changed. {MEANINGS[switch.name]}")
        return
    words.say(f"{switch.actor}, ", words.since(switch.updated_at), f": {switch.reason}",
              small=True)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """Turning a switch that stood like this when the page was drawn."""

    here: Group
    name: str
    on: bool

    def ask(self) -> Question:
        verb = "off" if self.on else "on"
        return Question(
            f"Switch {NAMES[self.name].lower()} {verb}", f"Switch {verb}", self._tell, self._act,
            "new prompts, look first",
        )  # fmt: skip

    def _tell(self) -> dict[str, Any]:
        state = next(
            s for s in read_switches(self.here.engine, self.here.name) if s.name == self.name
        )
        if state.on != self.on:
            raise Refused(
                f"{NAMES[self.name].lower()} was switched {'on' if state.on else 'off'} meanwhile "
                f"by {state.actor}: {state.reason}"
            )
        st.write(MEANINGS[self.name] if self.on else "It goes on as before it was switched off.")
        st.write("What is live does not change.")
        return {}

    def _act(self, reason: str) -> str:
        actions.turn(self.here, self.name, not self.on, reason=reason)
        return f"{NAMES[self.name]} is {'off' if self.on else 'on'}."


@refreshing(2.0)
def _going_on(here: Group) -> None:
    st.subheader("Now")
    run = run_progress.going_on(here.engine, here.id)
    running = run is not None and not run.lost
    started_here = trainings.ALL.is_running(here.name)
    ended = trainings.ALL.ended(here.name)
    if run is not None:
        live.show(words.joined(live.run_sentence(run), live.run_bar(run)))
        _curves_so_far(run)
    elif started_here:
        st.write("A run is starting.")
    else:
        st.write("No run goes on.")
    if ended is not None and ended.error:
        st.warning(
            words.literal(f"The run that was started here {ended.status}: {ended.error}"),
            icon=":material/warning:",
        )
    if login.is_operator():
        st.button(
            "Train now", icon=":material/play_arrow:", key="train now",
            disabled=running or started_here,
            help="A run is going on" if running or started_here
            else "On the newest requests, at low priority; nothing goes live by it",
            on_click=_ask_to_train, args=(here,),
        )  # fmt: skip
        if st.session_state.get("open train"):
            st.rerun()


#: What a curve is called, by its name in the progress of a run.
CURVES = {"loss": "objective (loss)", "reward": "reward",
          "accept_length": "held-out accept length"}  # fmt: skip
#: Points of a curve from which on their marks would run into each other.
CROWDED = 40


def _curves_so_far(run: RunProgress) -> None:
    """As far as there are any: of a run that goes on, or one that broke off."""
    shown = [(name, points) for name, points in run.curves.items() if name in CURVES and points]
    if not shown:
        return
    columns = st.columns(len(shown))
    for column, (name, points) in zip(columns, shown, strict=True):
        with column:
            title = CURVES[name]
            pairs = [(float(x), float(y)) for x, y in points]
            short = "accept length" if name == "accept_length" else title
            figure = charts.curves({title: pairs}, "updates", short)
            if len(pairs) > CROWDED:
                figure.update_traces(mode="lines")
            charts.show(figure, f"so far {name} {run.run_id}", f"{title} so far")


def _ask_to_train(here: Group) -> None:
    st.session_state[dialogs.ASKED] = Start(here).ask
    st.session_state["open train"] = True


@dataclass(frozen=True)
class Start:
    here: Group

    def ask(self) -> Question:
        st.session_state.pop("open train", None)
        return Question(
            "Train now", "Start", self._tell, self._act, "prompts of a new customer since noon"
        )

    def _tell(self) -> dict[str, Any]:
        live = data.aliases(self.here).get("live")
        last = next(iter(data.runs(self.here, 1)), None)
        st.write(
            f"A run on the newest requests, from {words.version(live)}, at low priority on the "
            "dashboard's machine. It makes a new version and compares it; it puts nothing live."
        )
        if last is not None:
            words.say("The last run started ", words.since(last.started_at), f": {last.status}.")
        st.caption("It ends when the dashboard is stopped.")
        return {}

    def _act(self, reason: str) -> str:
        actions.train(self.here, reason=reason)
        return "The run is starting."


# -- all runs -----------------------------------------------------------------------------------


@refreshing(5.0)
def _runs(here: Group) -> None:
    st.subheader("Runs")
    runs = data.runs(here, LIMIT)
    if not runs:
        st.info(
            "No run was made yet. The scheduler starts them (`aurora-sgl scheduler`), the demo "
            "does, `aurora-sgl train --once` does, and so does the button above.",
            icon=":material/hourglass_empty:",
        )
        return
    versions = data.versions_of_runs(here)
    rows = [_row(run, versions.get(run.id)) for run in runs]
    event = st.dataframe(
        pd.DataFrame(rows), hide_index=True, key="runs table", on_select="rerun",
        selection_mode="single-row", height=min(320, 38 + 35 * len(rows)), placeholder=words.NONE,
        alt="training runs, newest first",
        column_config={
            "run": st.column_config.NumberColumn(width=56),
            "started": words.time_column(),
            "requests": st.column_config.NumberColumn(format="localized"),
            "tokens": st.column_config.NumberColumn(format="localized", help="Trained tokens"),
            "before": st.column_config.NumberColumn(format="%.3f", help="Replayed accept length"),
            "after": st.column_config.NumberColumn(format="%.3f", help="Replayed accept length"),
            "why not": st.column_config.TextColumn(width="large"),
        },
    )  # fmt: skip
    if len(runs) == LIMIT:
        st.caption(f"The newest {LIMIT}; the SQL page has all of them: training_run.")
    _one(_chosen(runs, event.selection.rows), versions)


def _chosen(runs: Sequence[TrainingRun], picked: Sequence[int]) -> TrainingRun:
    """The run that was picked in the table, else that of the page's address, else the newest."""
    if picked and picked[0] < len(runs):
        run = runs[picked[0]]
        if st.query_params.get(CHOSEN) != str(run.id):
            st.query_params[CHOSEN] = str(run.id)
        return run
    asked = str(st.query_params.get(CHOSEN, ""))
    of_address = next((run for run in runs if str(run.id) == asked), None)
    if of_address is None:
        st.caption("Below: the newest. Choose another one in the table.")
    return of_address or runs[0]


def _row(run: TrainingRun, version: int | None) -> dict[str, Any]:
    return {
        "run": run.id,
        "state": STATES.get(run.status, run.status),
        "trigger": run.trigger,
        "started": run.started_at,
        "took": words.span(((run.finished_at or now()) - run.started_at).total_seconds()),
        "from": words.version(run.base_version_id),
        "made": words.version(version),
        "requests": run.requests or run.progress.get("requests", 0),
        "tokens": run.tokens,
        "before": run.metrics.get("accept_length_before"),
        "after": run.metrics.get("accept_length_after"),
        "why not": run.error,
    }


def _one(run: TrainingRun, versions: dict[int, int]) -> None:
    st.subheader(f"Run {run.id}: {STATES.get(run.status, run.status)}", divider="gray")
    if run.error:
        failed = run.status == "failed"
        message = words.literal(f"{run.status.capitalize()}: {run.error}")
        icon = ":material/error:" if failed else ":material/info:"
        (st.error if failed else st.info)(message, icon=icon)
    left, right = st.columns([2, 3], gap="large")
    with left:
        words.facts(
            f"run {run.id}",
            {
                "started": words.time(run.started_at),
                "ended": words.time(run.finished_at),
                "trigger": run.trigger,
                "from": words.version(run.base_version_id),
                "made": words.version(versions.get(run.id)),
                "data window": words.between(run.window_start, run.window_end),
                "objective": run.objective,
                **_numbers(run),
            },
        )
    with right:
        if run.status == "running":
            st.caption("Its curves are above, as they come.")
        elif run.progress:
            _broke_off(RunProgress.of(run))
        else:
            _curves(run)


def _broke_off(run: RunProgress) -> None:
    words.say(f"It broke off in this stage: {run.doing}.")
    _curves_so_far(run)


def _numbers(run: TrainingRun) -> dict[str, object]:
    """Every single number that the run left."""
    return {
        name.replace("_", " "): f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        for name, value in sorted(run.metrics.items())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _curves(run: TrainingRun) -> None:
    lengths = run.metrics.get("dev_accept_length") or []
    before, after = (run.metrics.get(f"accept_length_{name}") for name in ("before", "after"))
    if lengths:
        points = [(float(i), float(value)) for i, value in enumerate(lengths, 1)]
        shown = {"on requests held out for choosing": points}
        if before is not None and after is not None:
            shown["replay before and after"] = [(0.0, before), (float(len(points)), after)]
        figure = charts.curves(shown, "pass over the data", "accept length")
        charts.show(figure, f"lengths {run.id}", "held-out accept length over the run")
    for name, title in (("loss_curve", "objective (loss)"), ("reward_curve", "reward")):
        values = run.metrics.get(name) or []
        points = [(100 * (i + 0.5) / len(values), float(v)) for i, v in enumerate(values)
                  if v is not None]  # fmt: skip
        if points:
            figure = charts.curves({title: points}, "% of the run", title)
            charts.show(figure, f"{name} {run.id}", f"{title} over the run")
    if not lengths and not run.metrics.get("loss_curve"):
        st.caption("The run left no curves.")
