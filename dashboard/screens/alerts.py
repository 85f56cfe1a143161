"""Alerts: what is off and who takes care of it, what was off, and whether people were told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pandas as pd
import streamlit as st

from aurora_sgl import store
from aurora_sgl.errors import Refused
from aurora_sgl.rollout import alerts, status
from aurora_sgl.rollout.alerts import Alert
from aurora_sgl.rollout.status import SchedulerStatus
from aurora_sgl.store import queries
from aurora_sgl.store.models import AlertRecord, Delivery, Notification

from .. import actions, data, dialogs, login, words
from ..context import Group, group, now
from ..dialogs import Question
from ..parts import refreshing

SECONDS = 5.0
LIMIT = 2000
#: Notifications that are listed.
NEWEST = 20
SEVERITIES = {alerts.CRITICAL: "✖ critical", alerts.WARNING: "▲ warning"}
OPEN, OVER, NOT_TAKEN = "open", "over", "nobody took it"
STATES = {"waiting": "… waiting", "delivered": "✔ delivered", "given_up": "✖ given up"}
#: Asks for the whole page, from which a dialog is opened.
WHOLE = "open take"


def show() -> None:
    st.title("Alerts")
    _page()


@refreshing(SECONDS)
def _page() -> None:
    if st.session_state.pop(WHOLE, False):
        st.rerun()
    here = group()
    scheduler = status.scheduler(here.engine, here.name)
    rows = alerts.history(here.engine, here.name, limit=LIMIT)
    if not scheduler.alive:
        _nobody_looks(here, scheduler)
    _open([row for row in rows if row.ended_at is None], scheduler)
    _history(rows)
    _told(here)


def _nobody_looks(here: Group, scheduler: SchedulerStatus) -> None:
    """The history is the work of the scheduler that leads; what is off at this moment is not."""
    last = scheduler.updated_at
    since = f" (the last one was heard of {words.ago(last)})" if last else ""
    st.warning(
        f"No scheduler runs for this group{since}, so no alert begins or ends in this history, and "
        "nobody is notified. Start one with `aurora-sgl scheduler`; the demo has its own.",
        icon=":material/visibility_off:",
    )
    problems = alerts.alerts(here.engine, data.look(here))
    st.subheader("Off at this moment, not written down")
    words.table(
        "off at this moment",
        [{"severity": SEVERITIES[one.severity], "kind": _kind(one.kind),
          "what": _sentence(one)} for one in problems],
        empty="Nothing: servers run what they should, nothing was lost, nothing drifted.",
    )  # fmt: skip


def _sentence(alert: Alert) -> words.Html:
    when = words.since(alert.when) if alert.when is not None else None
    return words.joined(*(part for part in (alert.head, when, alert.tail) if part))


# -- those that are not over --------------------------------------------------------------------


def _open(rows: Sequence[AlertRecord], scheduler: SchedulerStatus) -> None:
    st.subheader("Open")
    if not rows:
        looked = scheduler.alive or scheduler.updated_at is not None
        st.caption("None." if looked else "None was ever written down.")
        return
    may = login.is_operator()
    for row in sorted(rows, key=_urgency):
        with st.container(border=True):
            _one(row, may, scheduler.alive)
    if not may:
        st.caption("Taking an alert needs an operator.")


def _urgency(row: AlertRecord) -> tuple[bool, bool, int]:
    """What nobody took first, then what is critical, then the newest."""
    return row.acknowledged_at is not None, row.severity != alerts.CRITICAL, -row.id


def _one(row: AlertRecord, may: bool, is_looked_at: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        with st.container():
            head = words.joined(words.Html("<b>"), SEVERITIES[row.severity], words.Html("</b> "))
            words.say(head, row.text, words.Html("<br><small>"), *_of(row, is_looked_at),
                      words.Html("</small>"))  # fmt: skip
        if may and row.acknowledged_at is None:
            st.button("Take it", icon=":material/back_hand:", key=f"take {row.id}",
                      on_click=_ask, args=(Take(group(), row.id),),
                      help="Say that you take care of it")  # fmt: skip


def _of(row: AlertRecord, is_looked_at: bool) -> Iterator[object]:
    yield from (f"{_kind(row.kind)}, number {row.id}, since ", row.began_at, ", for ")
    yield words.lasting(row.began_at)
    if not is_looked_at:
        yield from (" (last looked at ", words.since(row.seen_at), ")")
    if row.acknowledged_at is not None:
        yield from (f". Taken by {row.acknowledged_by} ", words.since(row.acknowledged_at))
        if row.acknowledgement:
            yield f": {row.acknowledgement}"


def _ask(take: Take) -> None:
    st.session_state[dialogs.ASKED] = take.ask
    st.session_state[WHOLE] = True


@dataclass(frozen=True)
class Take:
    """Taking an alert that nobody had taken when the page was drawn."""

    here: Group
    alert_id: int

    def ask(self) -> Question:
        return Question(
            f"Take alert {self.alert_id}", "Take it", self._tell, self._act, "restarting it",
            label="Note", help="What you do about it; it may be left empty.", needed=False,
        )  # fmt: skip

    def _tell(self) -> dict[str, Any]:
        with store.session(self.here.engine, write=False) as s:
            row = queries.alerts.alert(s, self.here.id, self.alert_id)
        if row.acknowledged_at is not None:
            raise Refused(f"{row.acknowledged_by} took it {words.ago(row.acknowledged_at)}")
        if row.ended_at is not None:
            raise Refused(f"it is over since {words.ago(row.ended_at)}")
        words.say(row.text)
        st.caption("It stays open until what it says is over; it counts as taken from now on.")
        return {}

    def _act(self, reason: str) -> str:
        actions.acknowledge(self.here, self.alert_id, note=reason)
        return f"Alert {self.alert_id} is yours."


# -- those that were ----------------------------------------------------------------------------


def _history(rows: Sequence[AlertRecord]) -> None:
    st.subheader("History")
    if not rows:
        st.caption("Nothing was written down: no alert began while a scheduler looked.")
        return
    left, middle, right = st.columns(3)
    kinds = left.multiselect("Kind", list(alerts.KINDS), placeholder="all", key="kinds",
                             format_func=_kind, bind="query-params")  # fmt: skip
    severity = middle.segmented_control("Severity", list(SEVERITIES), key="severity",
                                        bind="query-params")  # fmt: skip
    state = right.segmented_control("State", [OPEN, OVER, NOT_TAKEN], key="state",
                                    bind="query-params")  # fmt: skip
    shown = [
        row for row in rows
        if (not kinds or row.kind in kinds) and severity in (None, row.severity)
        and state in (None, OPEN if row.ended_at is None else OVER,
                      NOT_TAKEN if row.acknowledged_at is None else None)
    ]  # fmt: skip
    if not shown:
        st.caption(f"None of the {len(rows):,} alerts fits. Take a filter away.")
        return
    st.dataframe(
        pd.DataFrame([_row(row) for row in shown]), hide_index=True, key="alerts table",
        height=min(420, 38 + 35 * len(shown)), alt="alerts, newest first", placeholder=words.NONE,
        column_config={
            "number": st.column_config.NumberColumn(width=66),
            "began": words.time_column(),
            "ended": words.time_column(help="Empty: it still goes on"),
            "lasted": st.column_config.TextColumn(width=72),
            "severity": st.column_config.TextColumn(width=90),
            "kind": st.column_config.TextColumn(width=150),
            "what": st.column_config.TextColumn(width=420),
            "taken at": words.time_column(),
        },
    )  # fmt: skip
    if len(rows) == LIMIT:
        st.caption(f"Of the newest {LIMIT:,}; aurora-sgl alerts list --history --limit has more.")


def _row(row: AlertRecord) -> dict[str, Any]:
    lasted: timedelta = (row.ended_at or now()) - row.began_at
    return {
        "number": row.id,
        "began": row.began_at,
        "ended": row.ended_at,
        "lasted": words.span(lasted.total_seconds()),
        "severity": SEVERITIES[row.severity],
        "kind": _kind(row.kind),
        "what": row.text,
        "taken by": row.acknowledged_by or None,
        "taken at": row.acknowledged_at,
        "note": row.acknowledgement or None,
    }


def _kind(kind: str) -> str:
    return kind.replace("_", " ")


# -- notifications ------------------------------------------------------------------------------


def _told(here: Group) -> None:
    st.subheader("Notifications")
    with store.session(here.engine, write=False) as s:
        counts = queries.notifications.count_deliveries(s, here.id)
        newest = queries.notifications.notifications(s, here.id, limit=NEWEST)
        waiting = queries.notifications.oldest_waiting(s, here.id)
    if not newest:
        st.caption(
            "None was written. Receivers are named by AURORA_NOTIFY_WEBHOOK and "
            "AURORA_NOTIFY_SLACK where the scheduler runs; `aurora-sgl notify test` tries them."
        )
        return
    receivers = sorted({target for target, _ in counts})
    words.table(
        "deliveries",
        [{"receiver": one, **{label[2:]: f"{counts.get((one, state), 0):,}"
                              for state, label in STATES.items()}} for one in receivers],
        numbers=[label[2:] for label in STATES.values()],
        empty="No receiver was set when these were written, so nobody was sent anything.",
    )  # fmt: skip
    if waiting is not None:
        target, since, error = waiting
        words.say(f"The oldest one for {target} waits since ", since, f": {error}", small=True)
    words.table(
        "notifications", [_notification(row, deliveries) for row, deliveries in newest], empty=""
    )
    st.caption(f"The newest {NEWEST}; `aurora-sgl notify list` has more.")


def _notification(row: Notification, deliveries: Sequence[Delivery]) -> dict[str, object]:
    sent = [
        f"{one.target}: {STATES[one.state]}"
        + (f" after {one.attempts} attempts" if one.attempts > 1 else "")
        + (f" ({one.error})" if one.error and one.state != "delivered" else "")
        for one in deliveries
    ]
    return {
        "when": row.happened_at,
        "severity": row.severity,
        "kind": _kind(row.kind),
        "what": row.title,
        "sent": "; ".join(sent) or "to nobody",
    }
