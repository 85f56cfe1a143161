"""Compare: two versions beside each other, and what is known of which of them is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st

from aurora_sgl.rollout.comparison import Ancestry, DifferingValue, PairFacts, RunFacts, TrialFacts
from aurora_sgl.rollout.equal_shape import EqualStrata, ServedAtEqualShape
from aurora_sgl.rollout.replayed_pair import Against, Replayed

from .. import charts, data, pairs, two_replays, verdicts, words
from ..context import Group, group
from ..parts import refreshing
from .versions import ROLES

SIDES = ("a", "b")
#: Rows of tables that may be long.
MOST = 30
TABS = ("Origin and recipe", "Replay", "Served", "Trial", "By position", "Requests")


def show() -> None:
    st.title("Compare")
    here = group()
    ids = [version.id for version in data.versions(here)]
    if len(ids) < 2:
        st.info(
            f"{'There is one version' if ids else 'There is no version yet'}; two can be compared. "
            "The next one comes from a training run, or is imported: `aurora-sgl versions import "
            "FOLDER`.",
            icon=":material/hourglass_empty:",
        )
        return
    chosen = _choose(here, ids)
    if chosen is None:
        return
    if chosen[0] == chosen[1]:
        st.info(f"Both sides are version {chosen[0]}. Choose two versions to see what differs.")
        return
    _body(here, *chosen)


def _choose(here: Group, ids: Sequence[int]) -> tuple[int, int] | None:
    """``None``: one side is not chosen yet, or the address names what is no version here."""
    aliases = data.aliases(here)
    chosen: list[int | None] = []
    roles = {version: ROLES[name] for name, version in aliases.items()}
    for name, number in zip(SIDES, _usual(ids, aliases), strict=True):
        if st.session_state.get(_key(name)) not in ids:
            st.session_state[_key(name)] = _asked(name, ids, number)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        for name, label in zip(SIDES, ("Version", "with"), strict=True):
            chosen.append(
                st.selectbox(
                    label, ids[::-1], key=_key(name), width=220,
                    index=None if st.session_state[_key(name)] is None else 0,
                    placeholder="choose a version",
                    format_func=lambda id: f"{id}  {roles.get(id, '')}".strip(),
                )
            )  # fmt: skip
        st.button("Swap", icon=":material/swap_horiz:", on_click=_swap,
                  help="Differences are the second version's less the first's")  # fmt: skip
    first, second = chosen
    for name, taken in zip(SIDES, chosen, strict=True):
        if taken is not None:
            st.query_params[name] = str(taken)
    return None if first is None or second is None else (first, second)


def _key(side: str) -> str:
    return f"compared {side}"


def _asked(side: str, ids: Sequence[int], usual: int) -> int | None:
    """What the address says; ``None``, and a word, where that is no version of the group."""
    asked = str(st.query_params.get(side, "")).strip()
    if not asked:
        return usual
    number = int(asked) if asked.isdecimal() and len(asked) < 12 else 0
    if number in ids:
        return number
    st.warning(f"There is no version {words.literal(asked[:40])} in this group.",
               icon=":material/warning:")  # fmt: skip
    return None


def _usual(ids: Sequence[int], aliases: dict[str, int]) -> tuple[int, int]:
    """What live is beside: the candidate, else what was live before it, else the newest."""
    live = aliases.get("live", ids[-1])
    candidate = aliases.get("candidate")
    if candidate is not None and candidate != live:
        return live, candidate
    others = [aliases.get("previous"), *ids[::-1]]
    return next(each for each in others if each is not None and each != live), live


def _swap() -> None:
    first, second = (st.session_state.get(_key(side)) for side in SIDES)
    st.session_state[_key("a")], st.session_state[_key("b")] = second, first


# -- the whole ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two versions, and what is known of them but what was served."""

    here: Group
    facts: PairFacts

    @property
    def ids(self) -> tuple[int, int]:
        return self.facts.version_ids

    @property
    def names(self) -> tuple[str, str]:
        return words.version(self.ids[0]), words.version(self.ids[1])

    @property
    def less(self) -> str:
        """The heading of differences."""
        return f"{self.ids[1]} less {self.ids[0]}"

    def served(self) -> ServedAtEqualShape:
        return pairs.served(self.here.url, self.here.id, *self.ids)


def _body(here: Group, one: int, other: int) -> None:
    pair = Pair(here, pairs.facts(here.url, here.id, one, other))
    _in_short(pair)
    tabs = st.tabs(list(TABS), key="compared by", on_change="rerun", bind="query-params")
    draws: tuple[Callable[[Pair], None], ...] = (
        _origin, _replay, _served, _trial_again, _positions, _requests,
    )  # fmt: skip
    for tab, draw in zip(tabs, draws, strict=True):
        if tab.open:
            with tab:
                draw(pair)


@refreshing(15.0)
def _in_short(pair: Pair) -> None:
    """Every kind of evidence in a line."""
    pair = Pair(pair.here, pairs.facts(pair.here.url, pair.here.id, *pair.ids))
    rows = [_replay_line(pair), _served_line(pair), _trial_line(pair)]
    words.table("in short", rows, empty="")
    st.caption(
        f"Accept lengths; {pair.less}: above zero version {pair.ids[1]} is better. A replay is the "
        "only one of these on the very same requests."
    )


def _replay_line(pair: Pair) -> dict[str, object]:
    if not pair.facts.replays:
        rests = "never replayed against each other"
        return _line(pair, "replay on held-out requests", (None, None), words.NONE, rests)
    one = pair.facts.replays[0]
    lengths = words.number(one.accept_length[0]), words.number(one.accept_length[1])
    return _line(
        pair, "replay on held-out requests", lengths, _difference(one),
        words.joined(f"{one.requests:,} requests, {one.verdict}, ", words.since(one.created_at)),
    )  # fmt: skip


def _served_line(pair: Pair) -> dict[str, object]:
    served = pair.served()
    name = "served at equal shape"
    if served.overall is None:
        return _line(pair, name, (None, None), words.NONE, _why_not_served(served))
    return _line(pair, name, _lengths(served.overall), _less(served.overall),
                 f"{_count(served.overall.strata, 'stratum', 'strata')} of both, "
                 f"{sum(served.overall.requests):,} requests")  # fmt: skip


def _trial_line(pair: Pair) -> dict[str, object]:
    if not pair.facts.trials:
        return _line(pair, "trial in turns", (None, None), words.NONE, "no trial of these two")
    trial = pair.facts.trials[0]
    ends = words.difference(trial.difference, trial.ci_low, trial.ci_high)
    rests = f"{_count(len(trial.turns), 'window')}, {trial.verdict or trial.status}"
    lengths = tuple(map(words.number, trial.accept_length))
    return _line(pair, "trial in turns", (lengths[0], lengths[1]), ends, rests)


def _line(
    pair: Pair, name: str, lengths: tuple[object, object], difference: object, rests: object
) -> dict[str, object]:
    return {"known from": name, pair.names[0]: lengths[0], pair.names[1]: lengths[1],
            pair.less: difference, "rests on": rests}  # fmt: skip


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _difference(one: Replayed) -> str:
    return words.difference(one.difference, one.ci_low, one.ci_high)


def _less(one: EqualStrata) -> str:
    return words.difference(one.difference, one.ci_low, one.ci_high)


def _lengths(one: EqualStrata) -> tuple[str, str]:
    return (words.length(one.accept_length[0], one.interval[0]),
            words.length(one.accept_length[1], one.interval[1]))  # fmt: skip


# -- origin and recipe --------------------------------------------------------------------------


def _origin(pair: Pair) -> None:
    ancestry, (first, second) = pair.facts.ancestry, pair.names
    words.say(_kinship(ancestry, pair.ids))
    rows: list[dict[str, object]] = [
        {"version": str(step.version_id), "from": words.version(step.parent_id),
         "made": step.created_at, "how": step.origin, "note": step.note,
         "weights": "deleted" if step.pruned else "kept"}
        for way in ancestry.ways for step in way
    ]  # fmt: skip
    words.table("lineage", rows[:MOST], empty="")
    _rest(len(rows), "steps")
    st.markdown("**What they learnt from**")
    runs = [_run(run) for run in pair.facts.runs]
    rows = [
        {"": name, first: runs[0].get(name, words.NONE), second: runs[1].get(name, words.NONE)}
        for name in (runs[0] or runs[1])
    ]
    words.table("training runs", rows, empty="Neither was made by a training run of this store.")
    for name, run in zip(pair.names, pair.facts.runs, strict=True):
        if run is None and rows:
            st.caption(f"No training run of this store made {name}.")
    st.markdown("**What differs**")
    differing = [_differing(one, pair) for one in pair.facts.differing]
    equal = "Nothing that the store keeps: drafters of one shape, runs of one recipe."
    words.table("what differs", differing[:MOST], empty=equal)
    _rest(len(differing), "values")
    if not pair.facts.same_vocabulary:
        st.caption(
            "They propose from different draft vocabularies: a part of the difference may be which "
            "tokens each can propose at all."
        )


def _kinship(ancestry: Ancestry, ids: tuple[int, int]) -> str:
    steps = tuple(map(len, ancestry.ways))
    if ancestry.common is None:
        return f"Versions {ids[0]} and {ids[1]} have no ancestor in common."
    if not steps[0]:
        return f"Version {ids[1]} comes from version {ids[0]}, in {_count(steps[1], 'step')}."
    if not steps[1]:
        return f"Version {ids[0]} comes from version {ids[1]}, in {_count(steps[0], 'step')}."
    return (
        f"Both come from version {ancestry.common}: version {ids[0]} in "
        f"{_count(steps[0], 'step')}, version {ids[1]} in {_count(steps[1], 'step')}."
    )


def _run(run: RunFacts | None) -> dict[str, object]:
    if run is None:
        return {}
    domains = [f"{domain} {count:,}" for domain, count in run.domains.items()]
    more = f" and {len(domains) - 8} more" if len(domains) > 8 else ""
    return {
        "training run": str(run.run_id),
        "objective": run.objective,
        "started from": words.version(run.base_version_id),
        "data window": words.between(run.window_start, run.window_end),
        "requests": f"{run.requests:,}",
        "tokens": f"{run.tokens:,}",
        "domains": ", ".join(domains[:8]) + more or "not stored any more",
    }


def _differing(one: DifferingValue, pair: Pair) -> dict[str, object]:
    first, second = map(_value, one.values)
    return {"of the": one.kind, "name": one.name, pair.names[0]: first, pair.names[1]: second}


def _value(value: Any) -> str:
    if value is None:
        return words.NONE
    if isinstance(value, float):
        return f"{value:,.5g}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rest(count: int, what: str) -> None:
    if count > MOST:
        st.caption(f"The first {MOST} of {count:,} {what}; "
                   "`aurora-sgl versions compare` has all of them.")  # fmt: skip


# -- replay -------------------------------------------------------------------------------------


def _replay(pair: Pair) -> None:
    facts = pair.facts
    if facts.replays:
        _one_replay(pair, facts.replays[0])
        older = [
            {"when": one.created_at, pair.less: _difference(one), "interval": _level(one.level),
             "verdict": one.verdict, "requests": f"{one.requests:,}"}
            for one in facts.replays[1:MOST]
        ]  # fmt: skip
        if older:
            st.markdown("**Earlier replays of these two**")
            words.table("earlier replays", older, numbers=("requests",), empty="")
    else:
        st.write("They were never replayed against each other on the same requests.")
        if facts.against is not None:
            _third(pair, facts.against)
    gone = [name for name, pruned in zip(pair.names, facts.pruned, strict=True) if pruned]
    if gone:
        st.caption(f"The weights of {' and '.join(gone)} were deleted: no new replay is possible.")
        return
    st.caption("A new replay, on the newest held-out requests:")
    st.code(pairs.replay_command(pair.here, *pair.ids), language="sh")


def _one_replay(pair: Pair, one: Replayed) -> None:
    depth, topk, nodes = one.shape
    words.facts(
        "replay",
        {
            "made": words.joined(words.since(one.created_at), f", with version {one.candidate_id} "
                                 "as the candidate"),
            "requests": f"{one.requests:,}, the same for both",
            "draft shape": f"depth {depth}, top-k {topk}, {nodes} nodes" if depth else "not kept",
            pair.less: f"{_difference(one)}, interval of {_level(one.level)}",
            "verdict": one.verdict,
        },
    )  # fmt: skip
    st.markdown("**By domain**")
    rows = [
        {
            "domain": domain,
            pair.names[0]: words.number(of["accept_length"][0]),
            pair.names[1]: words.number(of["accept_length"][1]),
            f"{pair.less} (90%)": words.difference(of["difference"], of["ci_low"], of["ci_high"]),
            "verdict": of["verdict"],
            "requests": of["requests"],
        }
        for domain, of in verdicts.worst_first(one.by_domain, MOST)
    ]
    words.table("replay by domain", rows[:MOST], numbers=("requests",),
                empty="It was not split by domain.")  # fmt: skip
    _rest(len(rows), "domains")


def _third(pair: Pair, against: Against) -> None:
    st.write(
        f"Both were replayed against version {against.baseline_id}, each on the requests of its "
        "own time. The two differences are not of the same requests, and say less than a replay "
        "of one against the other:"
    )
    rows = [
        {
            "version": name,
            "when": one.created_at,
            f"less version {against.baseline_id}": _difference(one),
            "interval": _level(one.level),
            "verdict": one.verdict,
            "requests": f"{one.requests:,}",
        }
        for name, one in zip(pair.names, against.replays, strict=True)
    ]
    words.table("against a third version", rows, numbers=("requests",), empty="")


def _level(level: float | None) -> str:
    return words.NONE if level is None else f"{100 * level:.4g}%"


# -- served -------------------------------------------------------------------------------------


def _served(pair: Pair) -> None:
    served = pair.served()
    if served.overall is None:
        st.write(f"Nothing to compare: {_why_not_served(served)}.")
        return
    _strata(pair, "domain", served.by_domain)
    _strata(pair, "draft shape and accept rule", served.by_shape)
    parts = [
        f"{part / whole:.0%} of version {number}'s steps with drafts"
        for number, part, whole in zip(pair.ids, served.compared_steps, served.steps, strict=True)
        if whole
    ]
    st.caption(
        "Only what both served in the same domain, under the same accept rule"
        + ("" if served.over_shapes else " and draft shape")
        + f" ({', '.join(parts)}); each such stratum counts the same on both sides. Intervals: "
        "95%, over requests. They are other requests at another time: a replay is the better "
        "evidence."
    )
    if served.over_shapes:
        st.caption("Servers choose each step's tree, so draft shapes are taken together.")


def _strata(pair: Pair, kind: str, strata: dict[str, EqualStrata]) -> None:
    st.markdown(f"**By {kind}**")
    by_size = sorted(strata.items(), key=lambda item: -sum(item[1].requests))
    rows = [
        {
            kind: name,
            f"{pair.names[0]} (95%)": _lengths(one)[0],
            f"{pair.names[1]} (95%)": _lengths(one)[1],
            f"{pair.less} (95%)": _less(one),
            "requests": f"{one.requests[0]:,} and {one.requests[1]:,}",
        }
        for name, one in by_size
    ]
    words.table(f"served by {kind}", rows[:MOST], numbers=("requests",), empty="")
    _rest(len(rows), f"rows by {kind}")


def _why_not_served(served: ServedAtEqualShape) -> str:
    if not any(served.steps):
        return "neither served a request with drafts"
    if not all(served.steps):
        return "only one of them served requests with drafts"
    return "they served nothing of one kind often enough"


# -- trial --------------------------------------------------------------------------------------


@refreshing(5.0)
def _trial_again(pair: Pair) -> None:
    facts = pairs.facts(pair.here.url, pair.here.id, *pair.ids)
    if not facts.trials:
        st.write("There was no trial of these two. A trial lets a version and the live one take "
                 "turns on live traffic, which also measures speed:")  # fmt: skip
        live = data.aliases(pair.here).get("live")
        other = next((one for one in pair.ids if one != live), pair.ids[1])
        if live in pair.ids:
            st.code(f"aurora-sgl trial start {other} --reason TEXT", language="sh")
        else:
            st.caption("Neither is live now.")
        return
    for trial in facts.trials:
        _trial(pair, trial)


def _trial(pair: Pair, trial: TrialFacts) -> None:
    words.facts(
        f"trial {trial.trial_id}",
        {
            "trial": f"{trial.trial_id}, {trial.status}",
            "from, to": words.joined(trial.started_at, " to ", trial.finished_at or "now"),
            pair.less: words.difference(trial.difference, trial.ci_low, trial.ci_high)
            + (f", interval of {_level(trial.level)}" if trial.difference is not None else ""),
            "verdict": trial.verdict or words.NONE,
            "why": trial.reason or words.NONE,
        },
    )
    rows = [
        {
            "window": turn.number,
            "version": turn.version_id,
            "began": turn.started_at,
            "requests": f"{turn.requests:,}",
            "verify steps": f"{turn.verify_steps:,}",
            "accept length": words.number(turn.accept_length),
            "tokens/s of a stream": words.number(turn.tokens_per_second, 1),
        }
        for turn in trial.turns
    ]
    words.table(f"windows of trial {trial.trial_id}", rows[:MOST],
                numbers=("window", "version", "requests", "verify steps", "accept length",
                         "tokens/s of a stream"),
                empty="No window began yet.")  # fmt: skip
    _rest(len(rows), "windows")


# -- by position --------------------------------------------------------------------------------


def _positions(pair: Pair) -> None:
    shares = pairs.positions(pair.here.url, *pair.ids)
    if shares is None:
        st.write("Nothing to compare: of what they served last they have no draft shape, accept "
                 "rule and domain in common.")  # fmt: skip
        return
    names = [f"{name}" for name in pair.names]
    figure = charts.positions(
        dict(zip(names, shares.reached, strict=True)), dict.fromkeys(names, 1)
    )
    charts.show(figure, "compared positions", "share of steps that accepted at each depth, by both")
    rates = shares.rates(0), shares.rates(1)
    rows = [
        {
            "depth": depth + 1,
            **{f"{name}: of all steps": f"{shares.reached[side][depth]:.1%}"
               for side, name in enumerate(names)},
            **{f"{name}: of those that came so far": _percent(rates[side][depth])
               for side, name in enumerate(names)},
        }
        for depth in range(shares.depth)
    ]  # fmt: skip
    words.table("by position", rows, numbers=tuple(rows[0]), empty="")
    st.caption(
        f"Drafts of depth {shares.depth}, over {_count(shares.strata, 'stratum', 'strata')} "
        "(domain, accept rule, draft shape) that both served, each of one weight; "
        f"{shares.steps[0]:,} and {shares.steps[1]:,} steps of the last seven days in which each "
        "served."
    )


def _percent(rate: float | None) -> str:
    return words.NONE if rate is None else f"{rate:.1%}"


# -- single requests ----------------------------------------------------------------------------


def _requests(pair: Pair) -> None:
    two_replays.show(pair.here, pair.facts, pair.less)
