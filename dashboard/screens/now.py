"""Now: does speculation pay, what is live, better or worse, for whom, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import reduce
from operator import add
from time import monotonic

import streamlit as st

from aurora_sgl.rollout import alerts, status
from aurora_sgl.rollout.alerts import Alert
from aurora_sgl.step_cost import StepCost
from aurora_sgl.store.queries import trends
from aurora_sgl.store.queries.trends import Filter, ServedCounts
from aurora_sgl.trace_room import TraceRoom

from .. import buckets, charts, data, links, live, next_steps, standing, words
from ..context import Group, group, local, now
from ..parts import refreshing
from ..standing import Standing, StateLine

SECONDS = 5.0
ALL = "all domains"
WORSE = "▼ worse"


@dataclass(frozen=True)
class Moment:
    """Numbers of the present window and of yesterday."""

    window: data.Window
    served: ServedCounts
    by_domain: dict[str, ServedCounts]
    yesterday: ServedCounts
    yesterday_by_domain: dict[str, ServedCounts]
    tokens_per_second: float
    yesterday_tokens_per_second: float
    draft_share: float
    cost: StepCost  # as a server measured it

    @property
    def break_even(self) -> float | None:
        return self.cost.break_even

    @property
    def speed_up(self) -> float | None:
        """Of steps with drafts over plain steps, at the times that the engine measured."""
        if self.cost.gain:
            return self.cost.gain
        length = self.served.accept_length
        return length / self.break_even if length and self.break_even else None

    @property
    def stream(self) -> float | None:
        """Tokens per second of one stream whose steps all carry drafts."""
        length = self.served.accept_length
        draft_ms = self.cost.draft_ms
        return 1000 * length / draft_ms if length and draft_ms else None


#: Seconds for which the parts of one look share what they read, and for which the part that draws
#: itself every second goes on with the numbers of the others.
SHARED, KEPT = 2.0, 8.0
_LAST = "now: last look"


def show() -> None:
    """Parts side by side: one inside another would be drawn ever more often, since Streamlit sets a
    timer for it each time that the outer one is drawn."""
    st.title("Now")
    here = group()
    st.session_state.pop(_LAST, None)  # who opens the page, or turns to it again, sees it as it is
    _top(here)
    _problems(here)
    left, right = st.columns([3, 2], gap="large")
    with left:
        _trend_part(here)
        _servers(here)
    with right:
        _right(here)


@refreshing(2.0)
def _top(here: Group) -> None:
    """What is live is read anew each time, which costs little; the numbers are kept."""
    look, moment = _look(here, KEPT)
    fresh = replace(look, aliases=data.aliases(here))
    _headline(_standing(here, fresh, moment))
    if moment is not None:
        _numbers(fresh, moment, here)


@refreshing(SECONDS)
def _problems(here: Group) -> None:
    look = _look(here, SHARED)[0]
    _alerts(alerts.alerts(here.engine, look), look)


@refreshing(SECONDS)
def _trend_part(here: Group) -> None:
    moment = _look(here, SHARED)[1]
    if moment is not None:
        _trend(here, moment)


@refreshing(SECONDS)
def _right(here: Group) -> None:
    look, moment = _look(here, SHARED)
    if moment is not None:
        _for_whom(moment)
    _next(look, data.trace_room(here))


def _look(here: Group, seconds: float) -> tuple[status.GroupStatus, Moment | None]:
    """What costs something to read, at most so old."""
    of, when, pair = st.session_state.get(_LAST, (None, 0.0, None))
    if of != here or monotonic() - when > seconds:
        when, pair = monotonic(), (data.look(here), measure(here))
        st.session_state[_LAST] = (here, when, pair)
    both: tuple[status.GroupStatus, Moment | None] = pair
    return both


def measure(here: Group) -> Moment | None:
    """``None``: nothing was ever served."""
    window = data.window(here, now())
    if window is None:
        return None
    points = data.trend(here.url, Filter(here.id, window.since, window.until), "day")
    begin, end = yesterday(local(now()))
    before = data.trend(here.url, Filter(here.id, begin, end), "day")
    tokens_before = data.tokens_kept(here.url, here.id, begin, end)[0]
    tokens, steps, with_drafts = data.tokens_kept(here.url, here.id, window.since, window.until)
    return Moment(
        window=window,
        served=trends.total(points),
        by_domain=trends.by(points, lambda p: p.domain),
        yesterday=trends.total(before),
        yesterday_by_domain=trends.by(before, lambda p: p.domain),
        tokens_per_second=tokens / (window.until - window.since).total_seconds(),
        yesterday_tokens_per_second=tokens_before / (end - begin).total_seconds(),
        draft_share=with_drafts / steps if steps else 0.0,
        cost=data.step_cost(here),
    )


def yesterday(here: datetime) -> tuple[datetime, datetime]:
    """Its begin and end, in UTC: where clocks were turned it was no day of 24 hours."""
    today = here.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    return (today - timedelta(days=1)).astimezone(UTC), today.astimezone(UTC)


DRAW = {
    standing.GOOD: (st.success, "check_circle"),
    standing.INFO: (st.info, "info"),
    standing.WARNING: (st.warning, "trending_down"),
    standing.ERROR: (st.error, "error"),
}


def _headline(s: Standing) -> None:
    """The state in a sentence, what else holds, and where to go."""
    line = standing.headline(s)
    _say_state(line)
    for other in standing.beside(s):
        _say_state(other)


def _say_state(line: StateLine) -> None:
    draw, icon = DRAW[line.tone]
    quoted = f" ({words.literal(line.quoted)})" if line.quoted else ""
    draw(f"{line.text.strip()}{quoted}", icon=f":material/{icon}:")
    if line.step is not None:
        next_steps.link(line.step)


def _standing(here: Group, look: status.GroupStatus, moment: Moment | None) -> Standing:
    return data.standing_of(here, look, _speed(moment) if moment is not None else None)


def _speed(moment: Moment) -> standing.Speed:
    return standing.Speed(
        accept_length=moment.served.accept_length,
        speed_up=moment.speed_up,
        break_even=moment.break_even,
        draft_share=moment.draft_share,
        loses_at=tuple(sorted(size for size, gain in moment.cost.gains.items() if gain < 1)),
        is_now=moment.window.is_now,
    )


def _bar(moment: Moment) -> str:
    return f"break-even is {moment.break_even:.2f}" if moment.break_even else "not measured"


def _by_load(moment: Moment) -> str:
    """What drafts bring to one request alone and to several, or the accept length from which they
    do."""
    gains = moment.cost.gains
    if len(gains) > 1:
        some = [(group, gain) for group, gain in gains.items() if group <= 8][:3]
        return ", ".join(f"{gain:.2f} {_requests(group)}" for group, gain in some)
    return _bar(moment)


def _requests(group: int) -> str:
    """How many requests at once a group of batch sizes is; it is named by the largest of them."""
    return {1: "alone", 2: "of 2"}.get(group, f"of {group // 2 + 1} to {group}")


def _numbers(look: status.GroupStatus, moment: Moment, here: Group) -> None:
    live = look.aliases.get("live")
    first = data.deployments(here, 1)
    columns = st.columns([4, 5, 4, 5, 6])
    then, length = moment.yesterday.accept_length, moment.served.accept_length
    columns[0].metric("Live version", live or words.NONE, border=True,
                      delta=f"for {words.span((now() - first[0].created_at).total_seconds())}"
                      if first else None, delta_color="off", delta_arrow="off",
                      help=f"Since {words.both(first[0].created_at)}" if first else None,
                      )  # fmt: skip
    columns[1].metric(
        "Accept length", words.number(length), border=True,
        delta=f"{length - then:+.2f} on yesterday" if length and then else "nothing yesterday",
        delta_color="normal" if length and then else "off",
        delta_arrow="auto" if length and then else "off",
        help="1 + accepted proposals per verify step, over requests of one version",
    )  # fmt: skip
    columns[2].metric(
        "Speed-up", f"{moment.speed_up:.2f}x" if moment.speed_up else words.NONE, border=True,
        delta=_by_load(moment), delta_color="off", delta_arrow="off",
        help="Accept length over its break-even: the time of a step with drafts over that of a "
        "plain one, as a running server measured them; by requests at once where it knows more "
        "than one load. Where drafts lose they are left out",
    )  # fmt: skip
    plain_ms = moment.cost.plain_ms
    plain = 1000 / plain_ms if plain_ms else None
    columns[3].metric(
        "Tokens/s of a stream", words.number(moment.stream, 1), border=True,
        delta=f"{moment.stream - plain:+.1f} on no drafts" if moment.stream and plain
        else "not measured",
        delta_color="normal" if moment.stream and plain else "off",
        delta_arrow="auto" if moment.stream and plain else "off",
    )  # fmt: skip
    columns[4].metric(
        "Tokens/s of all servers", words.number(moment.tokens_per_second, 1), border=True,
        delta=f"yesterday {words.number(moment.yesterday_tokens_per_second, 1)}",
        delta_color="off", delta_arrow="off",
        help="Output tokens of all requests over the length of time",
    )  # fmt: skip
    span = words.span((moment.window.until - moment.window.since).total_seconds())
    if moment.window.is_now:
        st.caption(
            f"Now: the last {span}, with drafts on {moment.draft_share:.0%} of the steps. "
            "Yesterday: the whole day, in your time zone."
        )
    else:
        words.say(
            f"No traffic now. The numbers are of the last {span} with traffic, which ended ",
            words.since(moment.window.until), ".",
        )  # fmt: skip


def _in_words(alert: Alert) -> str:
    """The sentence, with how long ago it was."""
    return f"{alert.head}{words.ago(alert.when) if alert.when is not None else ''}{alert.tail}"


def _alerts(problems: list[Alert], look: status.GroupStatus) -> None:
    st.subheader("Alerts")
    if not problems:
        st.caption("None: servers run what they should, nothing was lost, nothing drifted.")
    for severe, draw, icon in ((True, st.error, "error"), (False, st.warning, "warning")):
        texts = [words.literal(_in_words(alert)) for alert in problems if alert.severe is severe]
        if texts:
            listed = texts[0] if len(texts) == 1 else "\n".join(f"- {text}" for text in texts)
            draw(listed, icon=f":material/{icon}:")
            steps = [next_steps.of_alert(one, look) for one in problems if one.severe is severe]
            next_steps.links(step for step in steps if step is not None)
    links.to("alerts", "Who takes care, and what was off before", "notifications")


def _trend(here: Group, moment: Moment) -> None:
    st.subheader("Accept length, 24 hours")
    until = moment.window.until
    day = buckets.period(until - timedelta(hours=24), until)
    fitted, points = buckets.fit(
        day,
        lambda since, until, bucket: data.trend(here.url, Filter(here.id, since, until), bucket),
    )
    if not points:
        st.caption("No step with drafts in these 24 hours.")
        return
    series = {ALL: list(trends.by(points, lambda p: p.bucket).items())}
    ends = buckets.ends(here.url, Filter(here.id), fitted.bucket, points, lambda p: ALL)
    drawn = buckets.placed(series, fitted.width, ends)
    beside = buckets.near(data.deployments(here, 40), drawn, fitted.width, day)
    figure = charts.trend(
        drawn, fitted.width, beside, break_even=moment.break_even, height=300
    )  # fmt: skip
    charts.show(figure, "now trend", "accept length of the last 24 hours with promotions")


def _for_whom(moment: Moment) -> None:
    st.subheader("For whom")
    rows = []
    for domain, today, before in _domains(moment):
        rows.append(
            {
                "domain": domain,
                "now": words.length(today.accept_length, today.interval),
                "yesterday": words.number(before.accept_length),
                "": verdict(today, before),
            }
        )
    words.table(
        "accept length by domain", rows, numbers=("now", "yesterday"),
        empty="No step carried drafts, so there is nothing to compare.",
    )  # fmt: skip


def _domains(moment: Moment) -> list[tuple[str, ServedCounts, ServedCounts]]:
    """(domain, now, yesterday), by name. Of many the worse and the busiest, and the sum of the
    others."""
    every = [
        (
            domain,
            moment.by_domain.get(domain, ServedCounts()),
            moment.yesterday_by_domain.get(domain, ServedCounts()),
        )
        for domain in sorted({*moment.by_domain, *moment.yesterday_by_domain})
    ]
    if len(every) <= words.MOST_DOMAINS:
        return every
    every.sort(key=lambda one: (verdict(one[1], one[2]) != WORSE, -one[1].verify_steps))
    rest = every[words.MOST_DOMAINS :]
    today = reduce(add, (one[1] for one in rest))
    before = reduce(add, (one[2] for one in rest))
    return [*every[: words.MOST_DOMAINS], (f"{len(rest):,} more together", today, before)]


def verdict(today: ServedCounts, before: ServedCounts) -> str:
    """Better or worse only where the 95% intervals do not overlap."""
    if not today.interval or not before.interval:
        return "too few to tell"
    if today.interval[0] > before.interval[1]:
        return "▲ better"
    if today.interval[1] < before.interval[0]:
        return WORSE
    return "= no clear change"


@refreshing(live.LIVE)
def _servers(here: Group) -> None:
    st.subheader("Servers")
    rows = [
        {
            "server": server.name,
            "runs": words.version(server.live_version_id),
            "state": words.server_state(server),
            "drafts": _drafts(server),
            "why": "" if server.silent else server.phase_reason,
            "heard of": words.since(server.last_seen_at),
        }
        for server in status.servers(here.engine, here.name)
    ]
    words.table(
        "servers", rows,
        empty="No server runs. Start one with: aurora-sgl serve --model PATH, or make demo.",
    )  # fmt: skip


def _drafts(server: status.ServerStatus) -> str:
    if not server.phase:
        return "not said yet"
    last = f"{server.phase}, {server.speculation_share or 0:.0%} of steps"
    return f"not known now; before {last}" if server.silent else last


def _next(look: status.GroupStatus, room: TraceRoom | None) -> None:
    st.subheader("What comes next")
    scheduler = look.scheduler
    facts: dict[str, object] = {
        "scheduler": f"{scheduler.state}: {scheduler.reason}" if scheduler.alive
        else _sentence(scheduler.reason)
    }  # fmt: skip
    if scheduler.alive and scheduler.next_action:
        when = words.since(scheduler.next_at) if scheduler.next_at else "when it is due"
        facts["next"] = words.joined(scheduler.next_action, ", ", when)
    if look.not_live is not None:
        facts["not live"] = _sentence(look.not_live.sentence)
    if look.training is not None:
        bar = live.run_bar(look.training)
        facts["training"] = words.joined(live.run_sentence(look.training), bar)
    if look.trial is not None and look.trial.trial.status == "running":
        facts["trial"] = live.trial_bar(look.trial)
    if look.stage is not None and look.stage.is_open:
        one = look.stage.stage
        facts["stage"] = (
            f"{words.version(one.version_id)} on {', '.join(one.servers)}: {look.stage.sentence}"
        )
    if look.freeze is not None:
        facts["freeze"] = words.joined(
            "nothing goes live by itself until ", look.freeze.ends_at,
            f" ({look.freeze.actor}: {look.freeze.reason})",
        )  # fmt: skip
    if look.watch is not None and look.watch.watch.status == "running":
        facts["watch"] = live.watch_bar(look.watch)
    if room is not None:
        facts["room for traces"] = _sentence(room.sentence())
    facts["retention"] = _sentence(look.retention.sentence)
    for switch in look.switches:
        why = f": {switch.reason}" if switch.reason else ""
        facts[switch.name.replace("_", " ")] = f"{'✔ on' if switch.on else '✖ off'}{why}"
    words.facts("what comes next", facts)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
