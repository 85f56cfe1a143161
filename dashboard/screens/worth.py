"""Worth: steps, seconds and money that drafts saved, against what training them cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import streamlit as st

from aurora_sgl.config import get_settings
from aurora_sgl.rollout.worth import FORMULA, MEANING, Prices, Saved, Trained, Worth, ranged

from .. import charts, data, words, worths
from ..context import group, zone
from ..parts import refreshing

SECONDS = 30.0
PERIODS = {"7 days": 7, "30 days": 30, "90 days": worths.LONGEST}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class WorthCells:
    """Numbers of one row, as text; the money is without its currency."""

    steps: str
    seconds: str
    training: str
    money: str

    @classmethod
    def of(cls, saved: Saved, trained: Trained, prices: Prices) -> WorthCells:
        return cls(
            _signed(saved.steps_saved) if saved.steps else words.NONE,
            _seconds(saved),
            f"{trained.seconds:,.0f}" if trained.seconds else words.NONE,
            ranged(prices.net(saved, trained), 2) or words.NONE,
        )


def show() -> None:
    st.title("Worth")
    _page()


@refreshing(SECONDS)
def _page() -> None:
    here = group()
    name = st.segmented_control(
        "Period", list(PERIODS), default="7 days", required=True, key="worth period",
        bind="query-params",
    )  # fmt: skip
    worth = worths.read(here, worths.last_days(PERIODS[str(name)]))
    prices = Prices.of(get_settings())
    if not worth.saved.steps and not worth.trained.seconds:
        _nothing(data.last_minute(here.url, here.id) is None)
        _formula()
        return
    _numbers(worth, prices)
    _left_out(worth.saved)
    _days(worth, prices)
    left, right = st.columns(2, gap="large")
    with left:
        _by_day(worth, prices)
    with right:
        _by_domain(worth, prices)
        _formula()


def _nothing(ever: bool) -> None:
    if ever:
        st.info(
            "No request was served yet, and no run trained. Send a request to a server's OpenAI "
            "endpoint, or run `make demo`; what drafts save is summed here within a minute.",
            icon=":material/hourglass_empty:",
        )
    else:
        st.info(
            "In this period no step carried drafts and nothing was trained: nothing was saved, "
            "and nothing spent. Choose a longer one.",
            icon=":material/hourglass_empty:",
        )


def _signed(number: float, digits: int = 0) -> str:
    return f"{number:+,.{digits}f}" if number else "0"


def _seconds(saved: Saved) -> str:
    if saved.seconds is None:
        return NOT_MEASURED if saved.steps else words.NONE
    low, high = saved.seconds
    return ranged(saved.seconds, 1 if max(abs(low), abs(high)) < 1000 else 0)


def _numbers(worth: Worth, prices: Prices) -> None:
    saved, trained = worth.saved, worth.trained
    columns = st.columns(4 if not prices.missing else 3)
    per_step = saved.tokens / saved.steps if saved.steps else None
    columns[0].metric(
        "Steps saved", f"{saved.steps_saved:,}", border=True,
        delta=f"{words.number(per_step)} tokens a step" if per_step else "no step with drafts",
        delta_color="off", delta_arrow="off",
        help="Tokens kept of steps with drafts, less these steps: without drafts each token is a "
        "step of its own",
    )  # fmt: skip
    columns[1].metric(
        "Server time saved", _duration(saved.seconds), border=True,
        delta=_verdict(saved), delta_color="off", delta_arrow="off",
        help="Seconds of servers; steps at a load where drafts lose count as losses",
    )  # fmt: skip
    columns[2].metric(
        "Training took", words.span(trained.seconds) if trained.seconds else words.NONE,
        border=True, delta=f"{trained.runs:,} runs began" if trained.runs != 1 else "1 run began",
        delta_color="off", delta_arrow="off",
        help="Of all its processes: runs that failed or gave nothing too, with their judging",
    )  # fmt: skip
    if prices.missing:
        names = " and ".join(f"`{name}`" for name in prices.missing)
        st.caption(
            f"No money is shown: give {names}, the price of an hour. Seconds of servers and of "
            "training are of different machines, so without prices they are not set off."
        )
        return
    net = prices.net(saved, trained)
    unit = f" {prices.currency}" if prices.currency else ""
    spent = prices.spent(trained) or 0.0
    columns[3].metric(
        words.literal(f"Money{unit and ','}{unit}"), ranged(net, 2) or words.NONE, border=True,
        delta=f"saved {ranged(prices.saved(saved), 2) or NOT_MEASURED}, training {spent:,.2f}",
        delta_color="off", delta_arrow="off",
        help="What the saved time of servers costs, less what training cost. It is money only "
        "where that time is put to use, or not paid for",
    )  # fmt: skip


def _duration(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return NOT_MEASURED
    low, high = (words.span(value) for value in ends)
    return low if low == high else f"{low} to {high}"


def _verdict(saved: Saved) -> str:
    if saved.seconds is None:
        return "no step times at this load"
    if saved.seconds[1] < 0:
        return "a loss: drafts cost more than they saved"
    if saved.seconds[0] < 0:
        return "may be a loss"
    return f"of {saved.timed_steps / saved.steps:.0%} of the steps"


def _left_out(saved: Saved) -> None:
    untimed = saved.steps - saved.timed_steps
    if untimed:
        st.caption(
            f"Not measured: {untimed:,} of {saved.steps:,} steps with drafts "
            f"({untimed / saved.steps:.1%}) were made at a load or in a shape at which their "
            "server did not time steps with and without drafts. They count in the steps, and are "
            "left out of seconds and money."
        )


# -- by day -------------------------------------------------------------------------------------


def _days(worth: Worth, prices: Prices) -> None:
    """Bars up for what was saved and down for what was lost and spent."""
    in_money = not prices.missing
    st.subheader("By day")
    up = "seconds" if not in_money else f"money, {prices.currency}" if prices.currency else "money"
    gained = [prices.saved(saved) if in_money else saved.seconds for _, saved, _ in worth.by_day]
    spent = [prices.spent(trained) if in_money else trained.seconds
             for _, _, trained in worth.by_day]  # fmt: skip
    if not any(gained) and not any(spent):
        st.caption("No seconds are known of this period, so there is nothing to draw.")
        return
    figure = go.Figure()
    labels = [f"{day.day:%d %b}" for day, _, _ in worth.by_day]
    _bars(figure, "saved by drafts (at least)", labels, [g and g[0] for g in gained], 0)
    _bars(figure, "spent on training", labels, [-s if s else None for s in spent], 1)
    figure.update_xaxes(type="category", nticks=5, tickangle=0)  # five fit a telephone
    figure.add_hline(y=0, line={"color": "#888", "width": 1})
    charts.laid_out(figure, 300, charts.label(up), showlegend=True, barmode="relative")
    charts.show(figure, "worth by day", "what drafts saved and training cost, by day")


def _bars(
    figure: go.Figure, name: str, days: Sequence[str], values: Sequence[float | None], style: int
) -> None:
    figure.add_bar(
        x=list(days), y=list(values), name=name,
        marker={"color": charts.COLOURS[style], "pattern": {"shape": charts.PATTERNS[style]}},
        hovertemplate=f"%{{x}}: %{{y:,.2f}}<extra>{name}</extra>",
    )  # fmt: skip


def _by_day(worth: Worth, prices: Prices) -> None:
    st.subheader("Each day")
    rows = [
        {"day": f"{day.day:%a %d %b}", **_row(WorthCells.of(saved, trained, prices), prices)}
        for day, saved, trained in reversed(worth.by_day)
        if saved.steps or trained.seconds
    ]
    words.table("worth by day", rows, numbers=list(rows[0])[1:], empty="")
    st.caption(f"Days of your time zone, {zone().key}. A run over midnight is of both.")


def _row(sums: WorthCells, prices: Prices) -> dict[str, object]:
    row: dict[str, object] = {
        "steps saved": sums.steps, "seconds saved": sums.seconds, "training, s": sums.training,
    }  # fmt: skip
    return row if prices.missing else {**row, "money": sums.money}


# -- by domain ----------------------------------------------------------------------------------


def _by_domain(worth: Worth, prices: Prices) -> None:
    st.subheader("By domain")
    parts = list(worth.by_domain.items())
    rest = parts[words.MOST_DOMAINS :]
    shown = parts[: words.MOST_DOMAINS]
    if rest:
        together = sum((saved for _, saved in rest), Saved())
        shown.append((f"{len(rest):,} more", together))
    rows = []
    for domain, saved in shown:
        row: dict[str, object] = {
            "domain": domain,
            "steps saved": _signed(saved.steps_saved),
            "seconds saved": _seconds(saved),
            "tokens a step": words.number(saved.tokens / saved.steps),
        }
        if prices.server_hour is not None:
            row["money"] = ranged(prices.saved(saved), 2) or NOT_MEASURED
        rows.append(row)
    words.table("worth by domain", rows, numbers=list(rows[0])[1:] if rows else (),
                empty="No step carried drafts in this period.")  # fmt: skip
    if rows:
        st.caption("Without training, which is for all domains together.")


def _formula() -> None:
    with st.expander("The formula", expanded=True, icon=":material/function:"):
        st.code("\n".join(FORMULA), language=None, wrap_lines=True)
        st.caption(words.literal(MEANING))
