"""The requests on which two versions differ most, and one of them under both, token by token.

What the store keeps of a replay are sums. The steps of the version that served a request are there
as they were recorded; those of the other one are replayed when an operator asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import streamlit as st

from aurora_sgl.errors import AuroraError
from aurora_sgl.evaluation.one_request import SECONDS, PairTask
from aurora_sgl.intervals import accept_length, or_none
from aurora_sgl.rollout.comparison import PairFacts
from aurora_sgl.rollout.replayed_pair import Replayed, RequestContrast
from aurora_sgl.sequences.held_out import RULES
from aurora_sgl.store.models import Request

from . import actions, data, login, replays, tokens, words
from .context import Group
from .parts import refreshing
from .screens.requests import decoder_of
from .steps import StepTold, have_tokens, tell

CHOSEN, REFUSED = "compared request", "replay refused"
#: Verify steps of a side that are drawn.
AT_ONCE = 300
#: Seconds between two looks at a replay that goes on.
LOOKS = 1.0


def show(here: Group, facts: PairFacts, less: str) -> None:
    worse, better = facts.contrasts
    if not worse and not better:
        st.write(
            "No replay of these two keeps single requests"
            + (" on which they differ." if facts.replays else ": there was none yet.")
        )
        return
    first, second = map(words.version, facts.version_ids)
    for title, contrasts in (("better", better), ("worse", worse)):
        st.markdown(f"**Where {second} is {title} by most**")
        rows = [
            {
                "request": str(one.request_id),
                "domain": one.domain,
                "rule": RULES.get(one.accept_rule, one.accept_rule),
                first: _side(one, 0),
                second: _side(one, 1),
                less: f"{one.difference:+.2f}",
            }
            for one in contrasts
        ]
        words.table(f"requests where the second is {title}", rows, numbers=(less,),
                    empty=f"On no request is it {title}.")  # fmt: skip
    st.caption("Accept lengths in the newest replay of both, with accepted drafts over steps; "
               "requests of fewer than five steps are left out.")  # fmt: skip
    replay = next(one for one in facts.replays if one.has_requests)
    _one(here, facts, replay, [*better, *worse])


def _side(one: RequestContrast, side: int) -> str:
    return (f"{one.accept_length[side]:.2f} ({one.accepted[side]:,.4g} / "
            f"{one.verify_steps[side]:,.4g})")  # fmt: skip


def _one(
    here: Group, facts: PairFacts, replay: Replayed, contrasts: Sequence[RequestContrast]
) -> None:
    by_id = {one.request_id: one for one in contrasts}
    if st.session_state.get(CHOSEN) not in by_id:
        asked = str(st.query_params.get("request", ""))
        number = int(asked) if asked.isdecimal() and len(asked) < 20 else 0
        st.session_state[CHOSEN] = number if number in by_id else contrasts[0].request_id
    chosen: int = st.selectbox(
        "Token by token", list(by_id), key=CHOSEN, width=420,
        format_func=lambda id: f"{id}: {by_id[id].difference:+.2f}, {by_id[id].domain}",
    )  # fmt: skip
    st.query_params["request"] = str(chosen)
    task = PairTask(here.url, here.id, chosen, facts.version_ids, _shape(replay),
                    replay.served_dtype or "bfloat16")  # fmt: skip
    goes_on = replays.ALL.seconds(task) is not None
    draw = refreshing(LOOKS if goes_on else None)(_token_by_token)
    draw(here, task, by_id[chosen], goes_on)


def _shape(replay: Replayed) -> tuple[int, int, int]:
    depth, topk, nodes = replay.shape
    return depth or 0, topk or 0, nodes or 0


def _token_by_token(here: Group, task: PairTask, contrast: RequestContrast, going: bool) -> None:
    request, events = data.request(here, task.request_id)
    if request is None:
        st.info("The request was deleted meanwhile, by retention or a purge: only the sums above "
                "are left.")  # fmt: skip
        return
    seconds = replays.ALL.seconds(task)
    if seconds is not None:
        if not going:
            st.rerun()  # so that this part looks again by itself
        st.info(f"It is being replayed under both, at low priority: {seconds:.0f} s of at most "
                f"{SECONDS:.0f} s.", icon=":material/hourglass_empty:")  # fmt: skip
        return
    if going:
        st.rerun()
    outcome = replays.ALL.outcome(task)
    if outcome is not None and outcome.answer is not None and request.may_train:
        _replayed(here, request, task, outcome.answer)
        return
    if outcome is not None:
        st.info(
            words.literal(f"It could not be replayed: {outcome.error or 'it may not be used'}.")
        )
    _ask(task, request)
    _served(here, request, task, events, contrast)


def _ask(task: PairTask, request: Request) -> None:
    """A button, or why there is none."""
    if refusal := st.session_state.pop(REFUSED, ""):
        st.error(words.literal(refusal), icon=":material/block:")
    if not task.shape[0]:
        st.caption("The draft shape of that replay was not kept, so it can't be repeated.")
    elif not request.may_train:
        st.caption("This request may not be used any more, so it is not replayed again.")
    elif not login.is_operator():
        st.caption("An operator can have it replayed under both, step by step.")
    else:
        st.button(
            "Replay it under both", icon=":material/play_arrow:", key="replay request",
            on_click=partial(_start, task),
            help=f"On the machine of this page, at low priority, in at most {SECONDS:.0f} s; it "
            "needs the request's trace and the weights of both",
        )  # fmt: skip


def _start(task: PairTask) -> None:
    try:
        actions.replay_request(task)
    except AuroraError as error:
        st.session_state[REFUSED] = str(error)


# -- both sides ---------------------------------------------------------------------------------


def _replayed(here: Group, request: Request, task: PairTask, answer: Mapping[str, Any]) -> None:
    decode, why = decoder_of(here, request, True)
    st.html(tokens.legend())
    for column, version, steps, covered in zip(
        st.columns(2, gap="medium"), task.version_ids, answer["steps"], answer["replayed"],
        strict=True,
    ):  # fmt: skip
        with column:
            accepted = sum(len(step[3]) for step in steps)
            _head(version, "replayed", accepted, len(steps))
            _draw(tell(_events(steps, version, task.shape)), decode)
            left = int(answer["tokens"]) - 1 - int(covered)
            if left > 0:
                st.caption(f"The last {left} tokens are not shown: what would follow them, and so "
                           "how far drafts would reach, is not known.")  # fmt: skip
    st.caption(
        f"{words.literal(why)} Both would have drafted like this for the answer that was served. "
        "The first token comes from the prompt's forward, before any draft."
    )


def _events(steps: Sequence[Sequence[Any]], version: int, shape: Sequence[int]) -> list[Any]:
    """As rows of ``queries.events.events``, for what draws those."""
    rows = []
    for number, (root, draft, parents, nodes, after) in enumerate(steps):
        rows.append(
            {
                "step": number, "position": root + 1, "drafter_version_id": version,
                "depth": shape[0], "accept_rule": "replayed", "batch_size": 1,
                "proposed": len(draft), "accepted": len(nodes), "kept": len(nodes) + 1,
                "first_rejected_at": 0 if len(nodes) == shape[0] else len(nodes) + 1,
                "draft_tokens": draft, "draft_parents": parents, "accepted_nodes": nodes,
                "target_tokens": [*(draft[node - 1] for node in nodes), *([] if after is None
                                                                          else [after])],
            }
        )  # fmt: skip
    return rows


def _served(
    here: Group, request: Request, task: PairTask, events: Sequence[Mapping[str, Any]],
    contrast: RequestContrast,
) -> None:  # fmt: skip
    """What was recorded under one of them, and what is known of the other."""
    under = [[event for event in events if event["drafter_version_id"] == version]
             for version in task.version_ids]  # fmt: skip
    decode, why = decoder_of(here, request, have_tokens(events))
    if any(under):
        st.html(tokens.legend())
    for side, column in enumerate(st.columns(2, gap="medium")):
        version, mine = task.version_ids[side], under[side]
        with column:
            if mine:
                accepted = sum(int(event["accepted"]) for event in mine)
                _head(version, "served", accepted, len(mine))
                _draw(tell(mine), decode)
                continue
            _head(version, "replayed", contrast.accepted[side], contrast.verify_steps[side])
            st.caption(
                "Only these sums are kept: this version did not serve the request"
                + (", or its steps were deleted by now." if not events else ".")
            )  # fmt: skip
    if any(under):
        st.caption(words.literal(why))


def _head(version: int, how: str, accepted: float, steps: float) -> None:
    length = words.number(or_none(accept_length(accepted, steps)))
    st.markdown(f"**Version {version}**, {how}: accept length {length} over {steps:,.4g} steps")


def _draw(steps: list[StepTold], decode: tokens.Decode | None) -> None:
    st.html(tokens.text(steps[:AT_ONCE], decode))
    if len(steps) > AT_ONCE:
        st.caption(f"The first {AT_ONCE} of {len(steps):,} steps.")
