"""What goes on right now, as bars: a training run, a trial, a watch."""

from __future__ import annotations

from html import escape

import streamlit as st

from aurora_sgl.rollout import trial as trials
from aurora_sgl.rollout import watch as watches
from aurora_sgl.rollout.run_progress import NOT_KNOWN, RunProgress
from aurora_sgl.rollout.trial import TrialStatus
from aurora_sgl.rollout.watch import WatchStatus

from . import words
from .context import Group, now
from .words import Html

#: Seconds between two looks at what may change within a moment: what servers run, what goes on.
LIVE = 1.0
#: Of the bars; the shell puts it into the page, once.
STYLE = """<style>
.aurora-bar {height:.5rem; border-radius:.25rem; overflow:hidden; margin:.3rem 0;
  background:color-mix(in srgb, currentColor 16%, transparent)}
.aurora-bar > span {display:block; height:100%; border-radius:.25rem; background:#0072B2;
  transition:width .4s}
.aurora-bar:not([aria-valuenow]) > span {width:100%; background:repeating-linear-gradient(-45deg,
  #0072B2 0 8px, color-mix(in srgb, #0072B2 55%, transparent) 8px 16px)}
</style>"""


def bar(label: str, share: float | None) -> Html:
    """``share`` in [0, 1]; ``None``: it goes on, nobody can tell how far it is."""
    name = f'role="progressbar" aria-label="{escape(label)}"'
    if share is None:
        return Html(f'<div class="aurora-bar" {name}><span></span></div>')
    percent = round(100 * min(1.0, max(0.0, share)))
    numbers = f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}"'
    return Html(
        f'<div class="aurora-bar" {name} {numbers}><span style="width:{percent}%"></span></div>'
    )


def show(markup: Html) -> None:
    """Bars are blocks, and have no place in a line of text."""
    st.html(f'<div class="aurora-say">{markup.markup}</div>')


def run_bar(run: RunProgress) -> Html:
    """Its stage, how far it is, and the time left."""
    if run.lost:
        return Html("")
    return words.joined(
        bar(f"run {run.run_id}: {run.doing}", run.share), f"{_capital(run.doing)}. {_left(run)}"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _left(run: RunProgress) -> str:
    if run.paused:
        return f"Paused by the scheduler: {run.paused}."
    if run.silent:
        return "It has said nothing lately: its process is stopped, or cut off from the store."
    whole, stage = run.left(now()), run.stage_left(now())
    if whole is not None:
        return f"{_capital(_about(whole))} left."
    if stage is not None:
        return f"{_capital(_about(stage))} left of this stage; of the whole run: {NOT_KNOWN}."
    return f"Time left: {NOT_KNOWN}."


def _about(seconds: float) -> str:
    return "a few seconds" if seconds < 5 else f"about {words.span(seconds)}"


def run_sentence(run: RunProgress) -> Html:
    """Which run it is, since when, from what."""
    if run.lost:
        return words.joined(
            f"Run {run.run_id} ({run.trigger}) was not heard of since ",
            run.updated_at or run.started_at,
            ": its trainer is gone. The next run ends it as failed.",
        )
    requests = f", on {run.requests:,} requests" if run.requests else ""
    return words.joined(
        f"Run {run.run_id} ({run.trigger}) goes on for ", words.lasting(run.started_at),
        f", from {words.version(run.base_version_id)}{requests}.",
    )  # fmt: skip


def trial_bar(trial: TrialStatus) -> Html:
    """Windows of a trial, and the time left."""
    row, planned = trial.trial, trial.planned
    names = f"{words.version(row.candidate_id)} against {words.version(row.baseline_id)}"
    left = trial.seconds_left(now())
    tail = "nobody opens its windows: no scheduler runs" if left is None else f"{_about(left)} left"
    return words.joined(
        bar(f"trial of {names}", trial.finished / planned),
        f"{names}: {trial.finished} of {planned} windows, {tail}",
    )


def watch_bar(watch: WatchStatus) -> Html:
    """Windows of a watch. How long one takes is for the traffic to say."""
    windows, planned = watch.windows, watch.planned
    name = words.version(watch.watch.version_id)
    last = f", the last one: {windows[-1].verdict}" if windows else ", the first one is open"
    return words.joined(
        bar(f"watch over {name}", len(windows) / planned),
        f"{name}: {len(windows)} of {planned} windows{last}",
    )


def show_trial_and_watch(here: Group) -> None:
    """Those that go on, if any do."""
    trial = trials.status(here.engine, here.name)
    if trial is not None and trial.trial.status == "running":
        show(words.joined(Html("<b>Trial</b>"), trial_bar(trial)))
    watch = watches.status(here.engine, here.name)
    if watch is not None and watch.watch.status == "running":
        show(words.joined(Html("<b>Watch</b>"), watch_bar(watch)))
