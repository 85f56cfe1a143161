"""What may be said of a group at a glance, in each state that its servers can be in.

The headline is the first state that holds, in the order of ``HEADLINES``; what holds beside it is
``beside``. A sentence claims what is so now: of servers that are not heard of, and of traffic that
is over, it speaks in the past.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aurora_sgl.rollout.status import GroupStatus, ServerStatus

from .next_steps import NextStep

GOOD, INFO, WARNING, ERROR = "good", "info", "warning", "error"
EXPLORING, OFF = "exploring", "off"  # phases, see ``sidecar.phase``
#: Requests that are looked at for whether they may be learnt from, and those that are enough.
NEWEST, ENOUGH = 200, 5
#: Settings by the reason for which requests are not traced, see ``engine.trace_budget``.
BUDGETS = {
    "long": "AURORA_CAPTURE_REQUEST_BYTES",
    "long_prompt": "AURORA_CAPTURE_REQUEST_BYTES",
    "outgrown": "AURORA_CAPTURE_REQUEST_BYTES",
    "memory": "AURORA_TRACE_MEMORY_BYTES",
    "rate": "AURORA_CAPTURE_BYTES_PER_SECOND",
    "behind": "AURORA_CAPTURE_BACKLOG_BYTES",
}
OURS = "`--speculative-algorithm` EAGLE, EAGLE3 or NEXTN"


@dataclass(frozen=True)
class Speed:
    """Of the present window, or the last one with traffic."""

    accept_length: float | None = None  # None: no step carried drafts
    speed_up: float | None = None  # None: not measured
    break_even: float | None = None
    draft_share: float = 0.0
    loses_at: tuple[int, ...] = ()  # groups of batch sizes at which drafts lose
    is_now: bool = True


@dataclass(frozen=True)
class Standing:
    """Everything that the sentences rest on."""

    look: GroupStatus
    speed: Speed | None  # None: nothing was ever served
    counters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by server
    codes: Mapping[str, frozenset[str]] = field(default_factory=dict)  # of notices, by server
    may_train: int = 0  # of the newest ``newest`` requests
    newest: int = 0

    @property
    def heard(self) -> list[ServerStatus]:
        return [server for server in self.look.servers if not server.silent]

    def started(self, server: ServerStatus) -> bool:
        """Whether our part runs in it."""
        return "agent" not in self.codes.get(server.name, ())

    @property
    def working(self) -> list[ServerStatus]:
        return [server for server in self.heard if self.started(server)]

    @property
    def learning(self) -> bool:
        return all(one.on for one in self.look.switches if one.name == "learning")


@dataclass(frozen=True)
class StateLine:
    """A state in words. ``text`` is Markdown in which all that others wrote stands in ``quoted``,
    which the page makes literal and puts behind it."""

    code: str
    tone: str
    text: str
    step: NextStep | None = None
    quoted: str = ""


# -- the headline -------------------------------------------------------------------------------

SERVED_PLAIN = "Requests are served without drafts."
VERSIONS = NextStep("What each server runs", "Versions", {}, "and what it should run")
TRAINING = NextStep("Training", "Training", {}, "the switches, and every run")
BY_DOMAIN = NextStep("Acceptance by domain", "Acceptance", {"lines": "by domain"},
                     "for whom drafts are accepted")  # fmt: skip


def headline(s: Standing) -> StateLine:
    return next(line for state in HEADLINES if (line := state(s)) is not None)


def _nothing_runs(s: Standing) -> StateLine | None:
    if s.look.servers:
        return None
    hint = (
        "Start one with `aurora-sgl serve --model PATH`, or run `make demo`. A server without "
        f"{OURS} is not shown here: nothing of it is recorded."
    )
    if s.speed is None:
        text = f"No request was served yet, and no server is running. {hint}"
        return StateLine("never", INFO, text, VERSIONS)
    return StateLine("no server", WARNING, f"**No server is running.** {_past(s)}{hint}", VERSIONS)


def _silent(s: Standing) -> StateLine | None:
    if s.heard:
        return None
    servers = len(s.look.servers)
    count = "The server is" if servers == 1 else f"All {servers} of them are"
    text = (
        f"**No server is heard of.** {count} down, or without a sidecar that reaches the store. "
        f"Whether requests are served, and how fast, is not known. {_past(s)}"
    )
    return StateLine("silent", ERROR, text, VERSIONS)


def _not_started(s: Standing) -> StateLine | None:
    if s.working:
        return None
    text = (
        "**The plugin did not start in any server that runs.** Serving goes on; nothing is "
        f"recorded, traced or swapped. {_past(s)}"
    )
    return StateLine("not started", ERROR, text, VERSIONS)


def _starting(s: Standing) -> StateLine | None:
    if s.speed is not None and s.speed.is_now:
        return None
    if any(server.phase for server in s.working):
        return None
    text = (
        "A server is starting: it is heard of, and has not said yet whether its steps carry "
        f"drafts. {_past(s)}"
    )
    return StateLine("starting", INFO, text, VERSIONS)


def _nothing_served(s: Standing) -> StateLine | None:
    if s.speed is not None:
        return None
    text = (
        "No request was served yet. Send one to a server's OpenAI endpoint, or run `make demo`; "
        "numbers appear here within seconds."
    )
    off = [one for one in s.working if one.phase == OFF]
    if off and len(off) == len(s.working):
        text += " Speculation is switched off: requests will be served without drafts."
    return StateLine("nothing served", INFO, text, VERSIONS)


def _switched_off(s: Standing) -> StateLine | None:
    if not all(server.phase == OFF for server in s.working):
        return None
    text = f"**Speculation is switched off** (`AURORA_SPECULATION`). {SERVED_PLAIN} {_past(s)}"
    return StateLine("off", WARNING, text, VERSIONS, s.working[0].phase_reason)


def _no_traffic(s: Standing) -> StateLine | None:
    if s.speed is None or s.speed.is_now:
        return None
    return StateLine("no traffic", INFO, f"**No traffic now.** {_past(s)}{_live(s)}", BY_DOMAIN)


def _no_drafts(s: Standing) -> StateLine | None:
    if s.speed is None or s.speed.accept_length is not None:
        return None
    text = (
        f"{_live(s)}No step carried drafts lately: speculation waits for a better drafter, or "
        f"requests ask for none. {SERVED_PLAIN}"
    )
    return StateLine("no drafts", WARNING, text, TRAINING, _why(s))


def _not_measured(s: Standing) -> StateLine | None:
    if s.speed is None or s.speed.speed_up is not None:
        return None
    text = (
        f"{_live(s)}{_length(s.speed)}. What that means for speed is known once a server has "
        f"measured steps with and without drafts.{_some(s)}"
    )
    return StateLine("not measured", INFO, text, BY_DOMAIN, _why(s))


def _slower(s: Standing) -> StateLine | None:
    speed = s.speed
    if speed is None or speed.speed_up is None or speed.speed_up >= 1:
        return None
    text = (
        f"**Speculation is not faster yet: {speed.speed_up:.2f} times the speed of decoding "
        f"without it.** {_live(s)}{_length(speed)}; {_bar(speed)}. {speed.draft_share:.0%} of the "
        f"steps carry drafts.{_some(s)}"
    )
    return StateLine("slower", WARNING, text, TRAINING)


def _exploring(s: Standing) -> StateLine | None:
    speed = s.speed
    if speed is None or not all(server.phase == EXPLORING for server in s.working):
        return None
    text = (
        f"**Speculation is being tried: {speed.speed_up or 0:.2f} times the speed of decoding "
        f"without it where drafts are carried,** which is on {speed.draft_share:.0%} of the steps. "
        f"{_live(s)}{_length(speed)}; {_bar(speed)}."
    )
    return StateLine("exploring", INFO, text, BY_DOMAIN, _why(s))


def _faster(s: Standing) -> StateLine | None:
    speed = s.speed or Speed()
    text = (
        f"**Speculation is faster: {speed.speed_up or 0:.2f} times the speed of decoding without "
        f"it.** {_live(s)}{_length(speed)}; {_bar(speed)}.{_loses(speed)}{_some(s)}"
    )
    return StateLine("faster", GOOD, text)


#: In the order in which they are asked; the last one holds where no other does.
HEADLINES: tuple[Callable[[Standing], StateLine | None], ...] = (
    _nothing_runs, _silent, _not_started, _starting, _nothing_served, _switched_off, _no_traffic,
    _no_drafts, _not_measured, _slower, _exploring, _faster,
)  # fmt: skip


def _past(s: Standing) -> str:
    """What was, of traffic that is over or servers that are not heard of."""
    speed = s.speed
    if speed is None:
        return ""
    if speed.accept_length is None:
        return "When requests were served last, no step carried drafts. "
    up = f", {speed.speed_up:.2f} times the speed without drafts" if speed.speed_up else ""
    return f"When requests were served last, a step yielded {speed.accept_length:.2f} tokens{up}. "


def _live(s: Standing) -> str:
    live = s.look.aliases.get("live")
    if live is None:
        return "No version is live. "
    behind = [server for server in s.working if not server.converged]
    if not behind:
        return f"Version {live} is live. "
    running = len(s.working) - len(behind)
    wanted = s.look.wanted_version_id or live
    return f"Version {wanted} should run and does on {running} of {len(s.working)} servers. "


def _length(speed: Speed) -> str:
    return f"Each step yields {speed.accept_length or 0:.2f} tokens"


def _bar(speed: Speed) -> str:
    return f"break-even is {speed.break_even:.2f}" if speed.break_even else "not measured"


def _loses(speed: Speed) -> str:
    if not speed.loses_at:
        return ""
    groups = [f"{most // 2 + 1} to {most}" if most > 2 else str(most) for most in speed.loses_at]
    return f" Drafts lose with {', '.join(groups)} requests at once."


def _why(s: Standing) -> str:
    return next((server.phase_reason for server in s.working if server.phase_reason), "")


def _some(s: Standing) -> str:
    """What does not hold of all servers."""
    servers, parts = s.look.servers, []
    for count, what in (
        (len(servers) - len(s.heard), "not heard of"),
        (sum(not s.started(one) for one in s.heard), "without our plugin"),
        (sum(one.phase == OFF for one in s.working), "switched off"),
        (sum(one.phase == EXPLORING for one in s.working), "still finding out"),
    ):
        if 0 < count < len(servers):
            parts.append(f" {count} of {len(servers)} servers {'is' if count == 1 else 'are'} "
                         f"{what}.")  # fmt: skip
    return "".join(parts)


# -- beside it ----------------------------------------------------------------------------------


def beside(s: Standing) -> list[StateLine]:
    """What else holds and is no alert: why nothing new can be learnt."""
    return [line for state in BESIDE if (line := state(s)) is not None]


def _consent(s: Standing) -> StateLine | None:
    if s.newest < ENOUGH or s.may_train:
        return None
    text = (
        f"None of the newest {s.newest} requests may be learnt from: their clients say no "
        "(`x-aurora-train`), or say nothing and `AURORA_TRAIN_BY_DEFAULT` is off. They are "
        "served and counted; the drafter stays as it is."
    )
    return StateLine("consent", INFO, text, NextStep(
        "Requests", "Requests", {}, "who they came from, by domain"))  # fmt: skip


def _capture_off(s: Standing) -> StateLine | None:
    if not s.learning:
        return None  # an alert says so
    off = [one.name for one in s.working if s.counters.get(one.name, {}).get("capture_share") == 0]
    if not off or len(off) < len(s.working):
        return None
    text = (
        "No server keeps hidden states of requests, so that training gets nothing new: "
        "`AURORA_CAPTURE_SHARE` or `AURORA_CAPTURE_BYTES` is 0 there, or the artifact root can't "
        "be written."
    )
    return StateLine("capture off", INFO, text, TRAINING)


def _budgets(s: Standing) -> StateLine | None:
    refused: dict[str, int] = {}
    admitted = 0
    for server in s.working:
        counters = s.counters.get(server.name, {})
        admitted += int(counters.get("traces_admitted", 0))
        for reason in (*BUDGETS, "latency"):
            refused[reason] = refused.get(reason, 0) + int(
                counters.get(f"traces_refused_{reason}", 0)
            )
    count = sum(refused.values())
    if count <= admitted:
        return None
    reason = max(refused, key=lambda name: refused[name])
    why = f"`{BUDGETS[reason]}`" if reason in BUDGETS else "keeping more would slow serving down"
    text = (
        f"{count:,} of {count + admitted:,} requests that may be learnt from were not kept for "
        f"training since the servers started, by their budgets; most of these for {why}."
    )
    return StateLine("budgets", INFO, text, TRAINING)


def _no_version(s: Standing) -> StateLine | None:
    strangers = [one.name for one in s.working if one.phase and one.live_version_id is None]
    if not strangers:
        return None
    text = (
        f"{len(strangers)} of {len(s.look.servers)} servers run a drafter that is no version of "
        "the store: their requests are counted, and nothing can be swapped there."
    )
    return StateLine("no version", INFO, text, VERSIONS)


def _staged(s: Standing) -> StateLine | None:
    stage = s.look.stage
    if stage is None or not stage.is_open:
        return None
    one = stage.stage
    over = f"{len(one.windows)} of {stage.planned} windows are over"
    judged = "it has passed there" if one.status == "passed" else over
    text = (
        f"Version {one.version_id} runs on {len(one.servers)} of {len(s.look.servers)} servers "
        f"before the rest; {judged}."
    )
    step = NextStep(f"Version {one.version_id}", "Versions", {"version": str(one.version_id)},
                    "its windows; continue to the rest, or abort")  # fmt: skip
    return StateLine("staged", INFO, text, step, ", ".join(one.servers))


def _frozen(s: Standing) -> StateLine | None:
    freeze = s.look.freeze
    if freeze is None:
        return None
    text = f"Nothing goes live by itself until {freeze.ends_at:%Y-%m-%d %H:%M} UTC."
    step = NextStep("Training", "Training", {}, "lift the freeze there")
    return StateLine("frozen", INFO, text, step, f"{freeze.actor}: {freeze.reason}")


BESIDE: tuple[Callable[[Standing], StateLine | None], ...] = (
    _staged, _frozen, _consent, _capture_off, _budgets, _no_version,
)  # fmt: skip
