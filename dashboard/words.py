"""Numbers and times as people read them, and small tables of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape, unescape
from typing import Any

import streamlit as st

from aurora_sgl.rollout.status import ServerStatus

from .context import local, now, zone

NONE = "–"  # noqa: RUF001


def literal(text: object) -> str:
    """Text of others for a place that reads Markdown: on one line, and nothing in it is markup.
    Clients choose domains and people their reasons; an image in one would be asked for. What
    Streamlit turns into links, signs and pictures by itself is parted where nobody sees it."""
    line = _MARKS.sub(r"\\\g<0>", " ".join(str(text).split()))
    return _BY_ITSELF.sub("\u2060", line)


#: What Markdown reads anywhere, around words, and at the begin of a line.
_MARKS = re.compile(
    r"[\\`*\[\]<>~$#&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[-+=]|(?<=^\d)[.)](?=\s|$)"
)
#: Before the slashes of an address, the dot after www and the @ of a mailbox; after the colon of
#: ``:smile:``; and in arrows, which become signs.
_BY_ITSELF = re.compile(
    r"(?<=:)(?=//)|(?i:(?<=www))(?=\.)|(?=@)|(?<=:)(?=[A-Za-z_+-])|(?<=[-=])(?=\\?>)|(?<=<)(?=-)"
)


@dataclass(frozen=True)
class Html:
    """Markup. No string, so that it is never cut, escaped or searched as one; where text is wanted
    it is its text. ``joined`` puts pieces together."""

    markup: str

    def __str__(self) -> str:
        return unescape(re.sub(r"<[^>]*>", "", self.markup))


def joined(*parts: object) -> Html:
    """Pieces of text, times and markup as one piece of markup."""
    return Html("".join(cell(part) for part in parts))


def number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def length(value: float | None, interval: tuple[float, float] | None = None) -> str:
    """An accept length, with its 95% interval: ``1.94 (1.90 to 1.98)``."""
    if value is None:
        return NONE
    return f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def version(version_id: int | None) -> str:
    return NONE if version_id is None else f"version {version_id}" if version_id else "unknown"


def difference(value: float | None, low: float | None, high: float | None) -> str:
    """``+0.12 (+0.04 to +0.20)``."""
    if value is None:
        return NONE
    return f"{value:+.2f}" + (
        f" ({low:+.2f} to {high:+.2f})" if low is not None and high is not None else ""
    )


def span(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3 h``, ``5 d``."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if abs(seconds) < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def ago(moment: datetime | None) -> str:
    if moment is None:
        return "never"
    seconds = (now() - moment).total_seconds()
    return f"{span(seconds)} ago" if seconds >= 0 else f"in {span(-seconds)}"


def age(moment: datetime) -> str:
    """How long ago, without the word: ``71 s``."""
    return span(max(0.0, (now() - moment).total_seconds()))


def utc(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def clock(moment: datetime | None) -> str:
    """In the viewer's zone, with the day unless it is today's."""
    if moment is None:
        return NONE
    here = local(moment)
    today = here.date() == local(now()).date()
    return f"{here:%H:%M:%S}" if today else f"{here:%d %b %H:%M}"


def time(moment: datetime | None) -> Html:
    """The viewer's time, UTC on hover."""
    if moment is None:
        return Html(NONE)
    return Html(
        f'<time datetime="{moment.astimezone(UTC).isoformat()}" title="{utc(moment)}" '
        f'tabindex="0">{escape(clock(moment))}</time>'
    )


def since(moment: datetime | None) -> Html:
    """How long ago, UTC on hover."""
    if moment is None:
        return Html("never")
    return _hoverable(moment, ago(moment))


def lasting(moment: datetime) -> Html:
    """For how long by now, UTC of its begin on hover."""
    return _hoverable(moment, age(moment))


def _hoverable(moment: datetime, text: str) -> Html:
    return Html(f'<time title="{utc(moment)}" tabindex="0">{escape(text)}</time>')


def both(moment: datetime) -> str:
    """The viewer's time and UTC, where nothing can be hovered over."""
    return f"{local(moment):%d %b %H:%M:%S} ({utc(moment)})"


def server_state(server: ServerStatus) -> Html:
    """Whether a server runs what it should; when not, why not."""
    if server.converged:
        return Html("✔ as wanted")
    if server.silent:
        return joined("✖ not heard of since ", server.last_seen_at)
    return joined("✖ ", server.reason)


def between(begin: datetime | None, end: datetime | None) -> Html:
    return joined(begin, " to ", end) if begin and end else Html(NONE)


def zone_help() -> str:
    """What stands behind a column of times."""
    offset = local(now()).utcoffset()
    minutes = int(offset.total_seconds() // 60) if offset else 0
    name = zone().key
    if not minutes:
        return f"In your time zone, {name}, which is UTC now"
    sign = "ahead of" if minutes > 0 else "behind"
    hours, rest = divmod(abs(minutes), 60)
    return f"In your time zone, {name}: {hours}:{rest:02} h {sign} UTC"


def time_column(label: str | None = None, *, only_time: bool = False, help: str = "") -> Any:
    """For ``st.dataframe``: the viewer's zone; the heading says on hover how far UTC is off."""
    return st.column_config.DatetimeColumn(
        label, format="HH:mm:ss.SSS" if only_time else "D MMM, HH:mm:ss",
        timezone=zone().key, help=f"{help}. {zone_help()}" if help else zone_help(),
        width=104 if only_time else 136,
    )  # fmt: skip


def cell(value: object) -> str:
    if isinstance(value, Html):
        return value.markup
    if isinstance(value, datetime):
        return time(value).markup
    return escape(NONE if value is None or value == "" else str(value))


#: Of the tables and lines below; the shell puts it into the page, once.
STYLE = """<style>
.aurora-table {width:100%; border-collapse:collapse; font-size:.875rem; line-height:1.4}
.aurora-table th {text-align:left; font-weight:600; opacity:.75}
.aurora-table th, .aurora-table td {padding:.35rem .6rem .35rem 0; vertical-align:top;
  overflow-wrap:break-word;
  border-bottom:1px solid color-mix(in srgb, currentColor 18%, transparent)}
.aurora-table td.number, .aurora-table th.number {text-align:right; white-space:nowrap;
  font-variant-numeric:tabular-nums}
.aurora-table time, .aurora-say time {border-bottom:1px dotted; white-space:nowrap}
.aurora-facts th {white-space:nowrap; padding-right:1.2rem; width:1%}
.aurora-scroll {overflow-x:auto}
.aurora-small {font-size:.875rem}
.aurora-links {max-height:16rem; overflow-y:auto}
.stHtml .aurora-links ul, .stHtml .aurora-chips, .stHtml .aurora-remarks {list-style:none;
  margin:0; padding:0}
.aurora-links li {margin:0; font-size:.875rem; line-height:1.35}
.aurora-links a {display:block; padding:.2rem 0; color:inherit; overflow-wrap:anywhere}
.aurora-chips {display:flex; flex-wrap:wrap; gap:.3rem}
.aurora-chips li {margin:0; padding:.05rem .55rem; border-radius:1rem; font-size:.8125rem;
  overflow-wrap:anywhere; border:1px solid color-mix(in srgb, currentColor 35%, transparent);
  background:color-mix(in srgb, currentColor 7%, transparent)}
.aurora-remarks li {margin:0 0 .6rem; padding:0 0 0 .7rem;
  border-left:3px solid color-mix(in srgb, currentColor 22%, transparent)}
.aurora-remarks p {margin:0; white-space:pre-wrap; overflow-wrap:anywhere; font-size:.9375rem}
.aurora-remarks span {opacity:.75}
/* On a telephone a table of many columns stands as names and values below each other. */
@media (max-width: 640px) {
  .aurora-wide thead {position:absolute; clip-path:inset(50%); width:1px; height:1px;
    overflow:hidden}
  .aurora-wide tr {display:block; padding:.4rem 0;
    border-bottom:1px solid color-mix(in srgb, currentColor 18%, transparent)}
  .aurora-wide td, .aurora-wide td.number {display:block; position:relative; text-align:left;
    white-space:normal; border:0; padding:.1rem 0 .1rem 9rem; min-height:1.4rem}
  .aurora-wide td::before {content:attr(data-name); position:absolute; left:0; width:8.5rem;
    font-weight:600; opacity:.75}
}
</style>"""


#: Columns of a table that is too wide for a telephone.
MANY = 5
#: Rows of a table of what clients name, of which there may be thousands.
MOST_ROWS = 40
#: Rows of a table whose others are summed into one more.
MOST_DOMAINS = 20


def table(
    caption: str,
    rows: Sequence[Mapping[str, object]],
    *,
    empty: str,
    numbers: Sequence[str] = (),
    whole: bool = True,
) -> None:
    """A small table; ``empty`` is said when there are no rows. Columns are the rows' keys. Unless
    ``whole``, of more than ``MOST_ROWS`` the first ones are shown: what matters most is there."""
    if not rows:
        st.caption(empty)
        return
    if not whole and len(rows) > MOST_ROWS:
        st.caption(f"The first {MOST_ROWS} of {len(rows):,}.")
        rows = rows[:MOST_ROWS]
    names = list(rows[0])
    css = {name: ' class="number"' if name in numbers else "" for name in names}
    head = "".join(f'<th scope="col"{css[name]}>{escape(name)}</th>' for name in names)
    body = "".join(
        "<tr>"
        + "".join(f'<td{css[n]} data-name="{escape(n)}">{cell(row.get(n))}</td>' for n in names)
        + "</tr>"
        for row in rows
    )
    wide = " aurora-wide" if len(names) >= MANY else ""
    st.html(
        f'<div class="aurora-scroll"><table class="aurora-table{wide}" '
        f'aria-label="{escape(caption)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


@dataclass(frozen=True)
class Link:
    """``href``: an address of ours, see ``addresses``."""

    text: str
    href: str
    hint: str = ""


def links(caption: str, rows: Sequence[Link]) -> None:
    """Links below each other; a long list is scrolled."""
    items = "".join(
        f'<li><a href="{escape(row.href)}" title="{escape(row.hint)}">{escape(row.text)}</a></li>'
        for row in rows
    )
    if items:
        st.html(f'<nav class="aurora-links" aria-label="{escape(caption)}"><ul>{items}</ul></nav>')


def chips(caption: str, names: Sequence[str]) -> None:
    """Words in frames beside each other."""
    items = "".join(f"<li>{escape(name)}</li>" for name in names)
    st.html(f'<ul class="aurora-chips" aria-label="{escape(caption)}">{items}</ul>')


def remarks(caption: str, rows: Sequence[tuple[Html, str]]) -> None:
    """(who and when, what he wrote): its lines stay lines, and nothing in it is markup."""
    items = "".join(
        f'<li><span class="aurora-small">{head.markup}</span><p>{escape(text)}</p></li>'
        for head, text in rows
    )
    st.html(f'<ul class="aurora-remarks" aria-label="{escape(caption)}">{items}</ul>')


def facts(caption: str, rows: Mapping[str, object]) -> None:
    """Names and values below each other."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{cell(value)}</td></tr>'
        for name, value in rows.items()
    )
    st.html(
        f'<table class="aurora-table aurora-facts" aria-label="{escape(caption)}">'
        f"<tbody>{body}</tbody></table>"
    )


def say(*parts: object, small: bool = False) -> None:
    """A line of text and times."""
    css = "aurora-say aurora-small" if small else "aurora-say"
    st.html(f'<p class="{css}">{joined(*parts).markup}</p>')
