"""When to train: a function of what the store says, without a clock or a database of its own."""

from __future__ import annotations

from dataclasses import dataclass

from aurora_sgl.config import SchedulerSettings

WAITING, TRAINING, COOLDOWN, OFF = "waiting", "training", "cooldown", "off"
PERIOD, REQUESTS, DRIFT = "period", "requests", "drift"
#: Why a run of ours was started; one by hand says otherwise.
TRIGGERS = (PERIOD, REQUESTS, DRIFT)


@dataclass(frozen=True)
class Facts:
    """Times are seconds ago; ``None``: never."""

    learning: bool
    live_id: int | None
    new_requests: int  # that may be learnt from, since the last run that succeeded began
    since_run: float | None  # since the last run ended, however
    since_success: float  # since the last run that succeeded began; without one, since the group
    since_rollback: float | None
    drift: str = ""  # said of the falls since that run; empty: none


@dataclass(frozen=True)
class Decision:
    """``trigger`` is set when a run should start now. ``next_in``: seconds until ``next_action``
    at the latest; ``None``: it depends on traffic or on a person."""

    trigger: str
    state: str
    reason: str
    next_action: str
    next_in: float | None = None


def decide(facts: Facts, rules: SchedulerSettings) -> Decision:
    """Switched off, nothing live, cooldown, too little that is new, then the triggers: drift,
    number of requests, period."""
    if not facts.learning:
        return Decision("", OFF, "learning is switched off", "train, once it is on again")
    if facts.live_id is None:
        return Decision("", WAITING, "no version is live yet", "train, once a server is there")
    rest = _cooldown(facts, rules)
    if rest is not None:
        return rest
    new, least = facts.new_requests, rules.min_new_requests
    if new < least:
        wanted = f"train, once {least} new requests may be learnt from"
        return Decision("", WAITING, f"{new} new requests, at least {least} needed", wanted)
    if rules.drift and facts.drift:
        return Decision(DRIFT, TRAINING, facts.drift, "train now")
    if rules.requests and new >= rules.requests:
        reason = f"{new} new requests (every {rules.requests})"
        return Decision(REQUESTS, TRAINING, reason, "train now")
    period = rules.minutes * 60
    if period and facts.since_success >= period:
        reason = f"{rules.minutes:g} minutes have passed, {new} new requests"
        return Decision(PERIOD, TRAINING, reason, "train now")
    return _wait(facts, rules)


def _cooldown(facts: Facts, rules: SchedulerSettings) -> Decision | None:
    length = rules.cooldown_minutes * 60
    reasons = [
        (length - ago, why)
        for ago, why in (
            (facts.since_run, "rest after a training run"),
            (facts.since_rollback, "rest after a rollback"),
        )
        if ago is not None and ago < length
    ]
    if not reasons:
        return None
    left, why = max(reasons)
    return Decision("", COOLDOWN, why, "look at the triggers again", left)


def _wait(facts: Facts, rules: SchedulerSettings) -> Decision:
    ways = []
    next_in = None
    if rules.requests:
        ways.append(f"at {rules.requests} new requests")
    if rules.minutes:
        next_in = max(0.0, rules.minutes * 60 - facts.since_success)
        ways.append(f"{rules.minutes:g} minutes after the last run")
    if rules.drift:
        ways.append("when the accept length falls in a domain")
    reason = f"{facts.new_requests} new requests since the last run"
    action = f"train {', or '.join(ways)}" if ways else "nothing: every trigger is off"
    return Decision("", WAITING, reason, action, next_in)
