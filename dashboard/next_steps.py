"""What to do next, as a link to the page that does it, with what is chosen there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import streamlit as st

from aurora_sgl.rollout.alerts import Alert
from aurora_sgl.rollout.status import GroupStatus

from .links import to

RUN = "run"  # in the address of Training: the run that is shown


@dataclass(frozen=True)
class NextStep:
    """``query``: of the page's address. ``hint``: Markdown, of what is there or what helps."""

    label: str
    page: str  # its title
    query: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""


def link(step: NextStep) -> None:
    """Streamlit makes its address, below the base path of a proxy too; the Tab key reaches it."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        to(step.page.lower(), step.label, "arrow_forward", step.query)
        if step.hint:
            st.caption(step.hint, width="content")


def links(steps: Iterable[NextStep]) -> None:
    """Each once."""
    drawn: list[NextStep] = []
    for step in steps:
        if step not in drawn:
            drawn.append(step)
            link(step)


# -- by kind of alert ---------------------------------------------------------------------------


def of_alert(alert: Alert, look: GroupStatus) -> NextStep | None:
    """``None``: an alert of a kind that this page does not know."""
    step = BY_KIND.get(alert.kind)
    return step(alert, look) if step is not None else None


def _fixed(label: str, page: str, hint: str, **query: str) -> Callable[..., NextStep]:
    return lambda alert, look: NextStep(label, page, query, hint)


def _version(version_id: int | None, hint: str) -> NextStep:
    if version_id is None:
        return NextStep("Versions", "Versions", {}, hint)
    return NextStep(f"Version {version_id}", "Versions", {"version": str(version_id)}, hint)


def _behind(alert: Alert, look: GroupStatus) -> NextStep:
    return _version(look.wanted_version_id, "what should run, and what each server does run")


def _watched(hint: str) -> Callable[[Alert, GroupStatus], NextStep]:
    def step(alert: Alert, look: GroupStatus) -> NextStep:
        return _version(look.watch.watch.version_id if look.watch else None, hint)

    return step


def _staged(hint: str) -> Callable[[Alert, GroupStatus], NextStep]:
    def step(alert: Alert, look: GroupStatus) -> NextStep:
        return _version(look.stage.stage.version_id if look.stage else None, hint)

    return step


def _notice(alert: Alert, look: GroupStatus) -> NextStep:
    if "learnt" in alert.head:
        return NextStep("Requests", "Requests", {}, "which ones; their clients, or the server's "
                        "settings, have to change")  # fmt: skip
    return NextStep("What each server runs", "Versions", {}, "docs/operations.md says what can be "
                    "wrong at the start, and what to do")  # fmt: skip


def _failed_run(alert: Alert, look: GroupStatus) -> NextStep:
    return NextStep(f"Run {alert.subject}", "Training", {RUN: alert.subject},
                    "its error; *Train now* makes another one")  # fmt: skip


_STARTS = "start one: `aurora-sgl serve --model PATH`"
#: Of every kind in ``alerts.KINDS``.
BY_KIND: dict[str, Callable[[Alert, GroupStatus], NextStep]] = {
    "server_silent": _fixed(
        "What each server runs", "Versions",
        "look at its log and its sidecar's `/health` (`AURORA_HEALTH_PORT`)",
    ),
    "server_behind": _behind,
    "no_server": _fixed("What a server would run", "Versions", _STARTS),
    "server_notice": _notice,
    "watch_failed": _watched("what it did, and why it was rolled back"),
    "watch_doubt": _watched("roll back there, or wait for the next window"),
    "stage_failed": _staged("what it did there, and why it was taken back"),
    "stage_waiting": _staged("continue to the rest there, or abort"),
    "drift": _fixed(
        "Acceptance by domain", "Acceptance", "whose accept length fell, and when",
        lines="by domain",
    ),
    "records_lost": _fixed(
        "Requests", "Requests",
        "what was recorded; `AURORA_RECORD_BUFFER` and `AURORA_SPOOL_BYTES` make more room",
    ),
    "traces_lost": _fixed(
        "Training", "Training",
        "what runs learnt from; `AURORA_CAPTURE_BACKLOG_BYTES` and `AURORA_TRACE_MEMORY_BYTES` "
        "make more room",
    ),
    "trace_room": _fixed(
        "Training", "Training", "what runs learnt from; `aurora-sgl db limits` says what is kept"
    ),
    "too_many_domains": _fixed(
        "Acceptance by domain", "Acceptance", "which ones; `AURORA_MOST_DOMAINS` is how many",
        lines="by domain",
    ),
    "switch_off": _fixed("Training", "Training", "switch it on again there"),
    "training_failed": _failed_run,
    "scheduler_silent": _fixed(
        "Training", "Training", "runs by hand; start it again: `aurora-sgl scheduler`"
    ),
    "notifications_late": _fixed(
        "Audit", "Audit", "who did what meanwhile; `aurora-sgl notify test` tries the receivers"
    ),
}  # fmt: skip
