"""SQL: a console that can only read, and only what it may."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from aurora_sgl.config import get_settings
from aurora_sgl.store.accounts import OPERATOR, VIEWER
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.queries import sql_console
from aurora_sgl.store.queries.sql_console import Answer

from .. import charts, downloads, exports, login, words
from ..context import Group, group
from ..parts import refreshing
from ..server import sql_roles_path

EXAMPLES = {
    "For whom did it get better?": """SELECT domain, drafter_version_id AS version,
       sum(requests) AS requests, sum(verify_steps) AS verify_steps,
       round(1 + 1.0 * sum(accepted) / sum(verify_steps), 3) AS accept_length
FROM v_accept_length_by_domain_hour
GROUP BY domain, drafter_version_id
ORDER BY domain, version""",
    "Accept length by version": """SELECT drafter_version_id AS version, depth, topk, nodes, mixed,
       requests, verify_steps, accept_length
FROM v_accept_length_by_version
ORDER BY version, depth, topk, nodes""",
    "Who put what live, and why?": """SELECT generation, created_at, action, version_id, actor,
       reason
FROM v_deployment_history
ORDER BY generation DESC""",
    "Requests with the shortest accept length": """SELECT id, domain, finished_at, verify_steps,
       round(1 + 1.0 * accepted / verify_steps, 2) AS accept_length
FROM request
WHERE verify_steps >= 20
ORDER BY 1.0 * accepted / verify_steps
LIMIT 50""",
    "Requests by hour": """SELECT hour, sum(requests) AS requests, sum(completion_tokens) AS tokens
FROM v_accept_length_by_domain_hour
GROUP BY hour
ORDER BY hour""",
}
#: Only for those who may see tokens. Of the last two minutes with traffic: all events may be a
#: hundred million.
TOKEN_EXAMPLES = {
    "Tokens that are rejected most often": """SELECT draft_token, target_token, count(*) AS steps
FROM v_rejected_tokens
WHERE rank = 1 AND at <= CURRENT_TIMESTAMP AND at >= (SELECT min(bucket_start) FROM (
    SELECT DISTINCT bucket_start FROM acceptance_minute ORDER BY bucket_start DESC LIMIT 2) m)
GROUP BY draft_token, target_token
ORDER BY steps DESC
LIMIT 50"""
}
STATEMENT, ANSWER = "statement", "answer"


def show() -> None:
    st.title("SQL")
    _page()


@refreshing(None)
def _page() -> None:
    here = group()
    user = login.account()
    assert user is not None
    role = OPERATOR if user.role == OPERATOR else VIEWER
    examples = {**EXAMPLES, **(TOKEN_EXAMPLES if role == OPERATOR else {})}
    left, right = st.columns([5, 2], gap="large")
    with left:
        st.selectbox(
            "Examples", list(examples), index=None, placeholder="Choose one to start from",
            key="example", on_change=_take, args=(examples,),
        )  # fmt: skip
        # The button's shortcut submits already; the form's own Ctrl+Enter would run it twice.
        with st.form("sql", border=False, enter_to_submit=False):
            typed = st.text_area(
                "Statement", key=STATEMENT, height=190, bind="query-params",
                placeholder="SELECT ... FROM v_accept_length_by_version",
            )  # fmt: skip
            asked = st.form_submit_button("Run", icon=":material/play_arrow:", type="primary",
                                          shortcut="Ctrl+Enter")  # fmt: skip
        if asked:
            st.session_state[ANSWER] = None
            with st.spinner("asking the store ..."):
                st.session_state[ANSWER] = run(here, typed or "", role)
    with right:
        _contents(role, is_sqlite(here.engine))
    answer = st.session_state.get(ANSWER)
    if answer is None:
        st.caption(
            f"One statement that reads. At most {sql_console.ROWS:,} rows are shown, and it is "
            f"stopped after {sql_console.SECONDS:.0f} seconds."
        )
    else:
        _answer(answer)


def run(here: Group, typed: str, role: str) -> Answer:
    """Raises ``AuroraError`` with the reason in words."""
    return sql_console.run_sql(
        here.engine,
        typed,
        with_tokens=role == OPERATOR and get_settings().show_text,
        role_url=sql_console.kept_role(sql_roles_path(), _sql_role(role)),
    )


def _sql_role(role: str) -> str:
    return OPERATOR if role == OPERATOR and get_settings().show_text else VIEWER


def _take(examples: dict[str, str]) -> None:
    chosen = st.session_state.get("example")
    if chosen:
        st.session_state[STATEMENT] = examples[chosen]


def _contents(role: str, sqlite: bool) -> None:
    st.markdown("**What can be asked**")
    words.table("views", [{"views": name} for name in sql_console.VIEWS], empty="")
    with st.expander("Tables and their columns"):
        for name, columns in sql_console.columns().items():
            st.caption(f"**{name}**: {', '.join(columns)}")
    if role != OPERATOR or not get_settings().show_text:
        st.caption(
            "Tokens read as NULL." if sqlite else "Columns with tokens, and the two views over "
            "them, are refused."
        )  # fmt: skip
    st.caption("Times are in UTC.")


def _answer(answer: Answer) -> None:
    rows = f"{len(answer.rows):,} row{'' if len(answer.rows) == 1 else 's'}"
    if not answer.columns:
        st.info("The statement returned no table.")
        return
    if answer.cut:
        st.warning(
            f"There are more rows; these are the first {len(answer.rows):,}. Count or sum in the "
            "statement, or narrow it with WHERE.",
            icon=":material/content_cut:",
        )
    st.caption(f"{rows} in {answer.seconds:.2f} s")
    if not answer.rows:
        st.info("No row fits. The statement is right, and there is nothing to show for it.")
        return
    frame = pd.DataFrame(answer.rows, columns=_distinct(answer.columns))
    table, chart = st.tabs(["Table", "Chart"])
    with table:
        st.dataframe(
            frame, hide_index=True, key="answer table", alt="the answer", placeholder="NULL"
        )
        downloads.offer("Download CSV", exports.csv(frame), "answer.csv", "text/csv")
    with chart:
        _chart(frame)


def _distinct(columns: list[str]) -> list[str]:
    """Names as they are, numbered where two are the same."""
    counts: dict[str, int] = {}
    names = []
    for column in columns:
        counts[column] = counts.get(column, 0) + 1
        names.append(column if counts[column] == 1 else f"{column} {counts[column]}")
    return names


def _chart(frame: pd.DataFrame) -> None:
    numbers = [name for name in frame.columns if pd.api.types.is_numeric_dtype(frame[name])]
    if not numbers:
        st.caption("No column of the answer holds numbers, so there is nothing to draw.")
        return
    left, middle, right = st.columns(3)
    across = left.selectbox("Across", list(frame.columns))
    others = [name for name in numbers if name != across] or numbers
    up = middle.selectbox("Up", others, index=len(others) - 1)
    kind = right.segmented_control("As", ["bars", "line", "points"], default="bars", required=True)
    if across is None or up is None:
        return
    figure = charts.plain(frame[across].tolist(), frame[up].tolist(), across, up, kind or "bars")
    charts.show(figure, "answer chart", f"{up} by {across}")
    words.say(f"{len(frame):,} rows.")
