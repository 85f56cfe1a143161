"""Requests: find one, and see token by token what the drafter was good for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pandas as pd
import streamlit as st

from aurora_sgl.config import get_settings
from aurora_sgl.intervals import accept_length, or_none
from aurora_sgl.store.models import Request
from aurora_sgl.store.queries.explorer import FoundRequest
from aurora_sgl.wire import WITHOUT_DRAFTS

from .. import data, login, sampling, tokens, words
from ..context import Group, group, now
from ..parts import refreshing
from ..steps import StepTold, have_tokens, tell

PERIODS = {
    "15 minutes": timedelta(minutes=15),
    "1 hour": timedelta(hours=1),
    "24 hours": timedelta(hours=24),
    "7 days": timedelta(days=7),
    "ever": None,
}
LIMIT = 200
#: Verify steps that are drawn at once.
AT_ONCE = 400
SHORTEST, LONGEST = 1.0, 9.0
CHOSEN = "request"
LARGEST = 2**63 - 1


def show() -> None:
    st.title("Requests")
    _page()


@refreshing(None)
def _page() -> None:
    here = group()
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    name = left.segmented_control(
        "Ended in the last", list(PERIODS), default="24 hours", required=True, key="ended",
        bind="query-params",
    )  # fmt: skip
    asked = right.text_input(
        "Or one request", key=CHOSEN, bind="query-params", placeholder="its number or rid",
        help="Its number, as the tables and the SQL page show it, or the rid that its client gave "
        "it (of what ended in the chosen time); the page's address keeps it.",
    ).strip()  # fmt: skip
    if asked:
        _one(here, _asked(here, asked, str(name)))
        return
    requests = _find(here, str(name))
    if requests is not None:
        _one(here, _table(requests))


def _asked(here: Group, asked: str, name: str) -> int | None:
    """The request of this number, else the one that is chosen of those with this rid."""
    number = int(asked) if asked.isdecimal() else LARGEST + 1
    if number <= LARGEST and data.request(here, number)[0] is not None:
        return number
    span = PERIODS[name]
    since = now() - span if span else None
    requests = data.find_requests(here, since=since, rid=asked, limit=LIMIT)
    return _table(requests) if requests else None


def _find(here: Group, name: str) -> list[FoundRequest] | None:
    span = PERIODS[name]
    top = st.columns(3)
    domains = top[0].multiselect(
        "Domain", data.domains(here.url, here.id, now() - span if span else None),
        placeholder="all", key="domain", bind="query-params",
    )  # fmt: skip
    version = top[1].selectbox(
        "Version", [version.id for version in data.versions(here)][::-1], index=None,
        placeholder="any", key="served_by", bind="query-params",
    )  # fmt: skip
    low, high = top[2].slider(
        "Accept length", SHORTEST, LONGEST, (SHORTEST, LONGEST), 0.1, key="lengths",
        bind="query-params",
        help="1 + accepted proposals per verify step, over the whole request",
    )  # fmt: skip
    requests = data.find_requests(
        here,
        since=now() - span if span else None,
        domains=tuple(domains),
        version_id=version,
        min_accept_length=low if low > SHORTEST else None,
        max_accept_length=high if high < LONGEST else None,
        limit=LIMIT,
    )
    if requests:
        return requests
    if data.last_minute(here.url, here.id) is None:
        st.info(
            "No request was served yet. Send one to a server's OpenAI endpoint, or run "
            "`make demo`; it is listed here when it has ended.",
            icon=":material/hourglass_empty:",
        )
    else:
        st.info("No request that has ended fits all of these. Choose a longer period, or take one "
                "of the filters away.")  # fmt: skip
    return None


def _table(requests: list[FoundRequest]) -> int:
    rows = [
        {
            "ended": one.finished_at,
            "domain": one.domain,
            "accept length": one.accept_length,
            "tokens": one.completion_tokens,
            "verify steps": one.verify_steps,
            "took": round(one.seconds, 2),
            "versions": ", ".join(map(str, one.version_ids)) or "no drafts",
            "ended by": one.finish_reason or one.status,
            "server": one.server,
            "request": str(one.request_id),
        }
        for one in requests
    ]
    event = st.dataframe(
        pd.DataFrame(rows), hide_index=True, key="requests table", on_select="rerun",
        selection_mode="single-row", height=min(320, 38 + 35 * len(rows)),
        alt="requests that ended, newest first",
        column_config={
            "ended": words.time_column(),
            "accept length": st.column_config.ProgressColumn(
                format="%.2f", min_value=1.0, max_value=max(4.0, *(one.accept_length or 1.0
                                                                   for one in requests)),
            ),
            "tokens": st.column_config.NumberColumn(help="Completion tokens"),
            "took": st.column_config.NumberColumn(format="%.2f s"),
        },
    )  # fmt: skip
    if len(requests) == LIMIT:
        st.caption(f"The newest {LIMIT} that fit; narrow the search to see others.")
    rows_picked = event.selection.rows
    index = rows_picked[0] if rows_picked and rows_picked[0] < len(requests) else 0
    if not rows_picked:
        st.caption("Below: the newest. Choose another one in the table.")
    return requests[index].request_id


def _one(here: Group, request_id: int | None) -> None:
    """``None``: what was typed is the number or the rid of none."""
    request, events = (None, []) if request_id is None else data.request(here, request_id)
    if request is None:
        st.info(
            "There is no request of this number in this group, or not any more, and none with this "
            "rid that ended in the chosen time. Clear the field to search."
        )
        return
    length = or_none(accept_length(request.accepted, request.verify_steps))
    st.subheader(f"Request {request_id}: accept length {words.number(length)}", divider="gray")
    if not events:
        st.info(
            "It has no verify steps in the store: it ended with its first token, or retention "
            f"deleted them (they are kept for {data.event_days(here)} days)."
        )
        return
    words.facts("request", _facts(request))
    steps = tell(events)
    decode, why = decoder_of(here, request, have_tokens(events))
    st.html(tokens.legend())
    shown = _part(steps)
    st.html(tokens.text(shown, decode))
    st.caption(
        f"{words.literal(why)} The first token comes from the prompt's forward, before any draft, "
        "and is not recorded. Point at a step, or reach it with Tab, to see what was proposed."
    )
    _steps(shown, decode)


def _facts(request: Request) -> dict[str, object]:
    seconds = (request.finished_at or now()) - request.admitted_at
    return {
        "admitted": words.joined(request.admitted_at, f", took {seconds.total_seconds():.2f} s"),
        "tokens": f"{request.prompt_tokens:,} of the prompt ({request.cached_tokens:,} cached), "
        f"{request.completion_tokens:,} of the answer",
        "steps": f"{request.verify_steps:,} verify steps, {request.accepted:,} of "
        f"{request.proposed:,} proposals accepted",
        "sampling": sampling.told(request.sampling) or "the server's default",
        **_without_drafts(request),
        "ended": f"{request.status}, {request.finish_reason or 'no reason given'}",
        "may be learnt from": "yes" if request.may_train else "no",
    }


def _without_drafts(request: Request) -> dict[str, object]:
    parameters = request.sampling.get(WITHOUT_DRAFTS)
    if not parameters:
        return {}
    return {"drafts": f"none: they would change what {parameters} makes of the answer"}


def decoder_of(here: Group, request: Request, has_tokens: bool) -> tuple[tokens.Decode | None, str]:
    """How tokens are shown, and why so."""
    if not login.is_operator():
        return None, "Which tokens these are is shown to operators only."
    if not get_settings().show_text:
        return None, "This installation shows no tokens (AURORA_SHOW_TEXT is off)."
    if not has_tokens:
        return None, (
            "Counts only: the store has no tokens of a request that may not be learnt from "
            "(x-aurora-train: no, or the server's setting), unless AURORA_KEEP_OPTED_OUT_TOKENS "
            "is on."
        )
    if not request.may_train:
        return tokens.as_number, (
            "Ids only: this request's text may not be used (x-aurora-train: no, or the server's "
            "setting)."
        )
    decode = data.decoder(*data.target(here))
    if decode is None:
        return tokens.as_number, (
            f"Ids only: the tokenizer of {data.target(here)[0]} is not on this machine."
        )
    return decode, "Text from the target's tokenizer; the store keeps ids only."


def _part(steps: list[StepTold]) -> list[StepTold]:
    if len(steps) <= AT_ONCE:
        return steps

    def span(start: int) -> str:
        return f"{start + 1} to {min(len(steps), start + AT_ONCE)} of {len(steps)}"

    starts = list(range(0, len(steps), AT_ONCE))
    begin = st.selectbox("Steps", starts, width=240, format_func=span)
    return steps[begin : begin + AT_ONCE]


#: Pixels of the columns with short numbers, so that the last column is seen too.
WIDTHS = {"step": 50, "version": 62, "depth": 56, "accepted": 76, "kept": 50, "rejected at": 88,
          "batch": 56}  # fmt: skip


def _steps(steps: Sequence[StepTold], decode: tokens.Decode | None) -> None:
    rows: list[dict[str, Any]] = []
    for step in steps:
        event = step.event
        row = {
            "step": step.number,
            "at": event["at"],
            "version": event["drafter_version_id"],
            "depth": event["depth"],
            "accepted": event["accepted"],
            "kept": event["kept"],
            "rejected at": step.rejected_at or None,
            "signs": " ".join(tokens.SIGNS[token.kind] for token in step.tokens),
        }
        if decode is not None:
            row["output"] = "|".join(decode(token.id) for token in step.tokens)
            row["rejected proposals"] = "|".join(
                decode(p.token) for p in step.proposals if not p.accepted
            )
        row |= {
            "batch": event["batch_size"],
            "since swap": event["swap_age"],
            "mixed KV": event["mixed"],
        }
        rows.append(row)
    st.markdown("**The same, step by step**")
    st.dataframe(
        pd.DataFrame(rows), hide_index=True, key="steps table", alt="verify steps of the request",
        placeholder=words.NONE,
        height=min(320, 38 + 35 * len(rows)),
        column_config={
            **{name: st.column_config.NumberColumn(width=width) for name, width in WIDTHS.items()},
            "at": words.time_column(only_time=True),
            "since swap": st.column_config.NumberColumn(
                width=92, help="Verify steps of the server since its last swap"
            ),
            "mixed KV": st.column_config.CheckboxColumn(
                width=84, help="Draft KV of more than one version, or with holes"
            ),
        },
    )  # fmt: skip
