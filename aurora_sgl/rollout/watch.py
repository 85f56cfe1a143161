"""The watch over a promotion: windows of live traffic against what was served before it.

A promotion starts its watch in the same transaction; :func:`tick` carries it on from the store
alone, so that any process may do it, and one that died is replaced by the next. Windows are cut
from the times of the requests, not from when somebody looked.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import WatchSettings
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.intervals import AcceptCounts, accept_length, or_none
from aurora_sgl.rollout.live_traffic import (
    Comparison,
    Pace,
    compare,
    key_of,
    paces,
    speeds,
    strata,
    telling,
)
from aurora_sgl.rollout.promote import rollback
from aurora_sgl.store import queries
from aurora_sgl.store.liveness import LOST_SECONDS, is_silent
from aurora_sgl.store.models import Watch, WatchWindow
from aurora_sgl.store.queries.request_counts import RequestCounts

#: One-sided tails: worse beyond doubt (alone enough), and worse as far as one window tells.
DOUBTLESS, TELLING = 0.001, 0.05
#: What the keys of a baseline's sums are made of, see ``live_traffic.key_of``.
BASELINE_KEYS = "depth/topk/nodes/rule/domain"
#: Requests of the baseline that are looked at.
BASELINE_REQUESTS = 400
#: Requests of a domain below which replayed ones are taken into the baseline too.
FEW_REQUESTS = 20
#: How much longer a window may get for the sake of requests that can be compared.
PATIENCE = 4
#: Seconds by which the clocks of scheduler and servers may differ.
SKEW_SECONDS = 60.0
#: Smallest share of steps with drafts that stretches a window.
LEAST_SHARE = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchStatus:
    """A watch with its windows so far."""

    watch: Watch
    windows: Sequence[WatchWindow]

    @property
    def planned(self) -> int:
        """Windows that end it well."""
        return WatchSettings.model_validate(self.watch.settings).windows


@dataclass(frozen=True)
class Verdict:
    """What one window came to: pass, bad, fail (beyond doubt) or empty."""

    verdict: str
    reason: str


def status(engine: Engine, group: str) -> WatchStatus | None:
    """The newest watch of a group, running or not; ``None``: there was none."""
    with store.session(engine, write=False) as s:
        watches = queries.watches.watches(s, queries.groups.group_by_name(s, group).id, limit=1)
        return (
            WatchStatus(watches[0], queries.watches.watch_windows(s, watches[0].id))
            if watches
            else None
        )


def tick(
    engine: Engine,
    group_id: int,
    *,
    settings: WatchSettings | None = None,
    now: datetime | None = None,
) -> WatchStatus | None:
    """Close the windows that are over and act on them; ``None``: no watch is running.

    Rolls back when a window is worse beyond doubt, or ``failures`` of them are bad or empty.
    """
    moment = now or utc_now()
    with store.session(engine) as s:
        watch = queries.watches.running_watch(s, group_id, lock=True)
        if watch is None:
            return None
        if queries.aliases.aliases(s, group_id).get("live") != watch.version_id:
            queries.watches.end_watch(s, watch, "ended", "another version went live")
            return WatchStatus(watch, queries.watches.watch_windows(s, watch.id))
        if not watch.settings:
            watch.settings = (settings or WatchSettings()).model_dump(mode="json")
        rules = WatchSettings.model_validate(watch.settings)
        if watch.baseline.get("keys") != BASELINE_KEYS:  # new, or of a release with other keys
            watch.baseline = _baseline(s, watch, rules)
            s.flush()
        windows = list(queries.watches.watch_windows(s, watch.id))
        while outcome([row.verdict for row in windows], rules) is None:
            row = _next_window(s, watch, windows, rules, moment)
            if row is None:
                return WatchStatus(watch, windows)
            log.info("watch over version %d: %s", watch.version_id, row.reason)
            windows.append(row)
    return _conclude(engine, watch, windows, rules)


def filled(
    clusters: Sequence[RequestCounts], baseline: dict[str, AcceptCounts], rules: WatchSettings
) -> int:
    """How many of the clusters fill a window; 0: it goes on. Requests of a kind that was not served
    before tell nothing and do not count, unless there are ``PATIENCE`` times as many of them."""
    base_strata = telling(baseline)
    steps = counted_steps = 0
    requests: set[int] = set()
    counted: set[int] = set()
    for count, cluster in enumerate(clusters, start=1):
        requests.add(cluster.request_id)
        steps += cluster.verify_steps
        if not base_strata or key_of(cluster) in base_strata:
            counted.add(cluster.request_id)
            counted_steps += cluster.verify_steps
        if count < len(clusters) and clusters[count].request_id == cluster.request_id:
            continue  # it had drafts of another shape too
        if len(counted) >= rules.requests and counted_steps >= rules.steps:
            return count
        if len(requests) >= PATIENCE * rules.requests and steps >= PATIENCE * rules.steps:
            return count
    return 0


def judge(
    clusters: Sequence[RequestCounts],
    baseline: dict[str, AcceptCounts],
    rules: WatchSettings,
    earlier: Sequence[RequestCounts] = (),
) -> tuple[Verdict, Comparison | None]:
    """Accept length of a window's requests against the baseline on the same mix, and of each domain
    with those of the windows before, ``earlier``."""
    comparison = compare(clusters, baseline)
    if comparison is None:
        return Verdict("pass", "nothing of the kind was served before; nothing to compare"), None
    summary = f"accept length {comparison.accept_length:.3f}, expected {comparison.expected:.3f}"
    floor = -rules.margin * comparison.expected
    if comparison.chance(rules.margin) < DOUBTLESS:
        return Verdict("fail", f"{summary}: worse beyond doubt"), comparison
    if lost := fallen([*earlier, *clusters], baseline, rules.margin):
        return Verdict("fail", f"{summary}: worse beyond doubt in {', '.join(lost)}"), comparison
    if comparison.difference < floor and comparison.chance() < TELLING:
        return Verdict("bad", f"{summary}: worse than the margin allows"), comparison
    return Verdict("pass", summary), comparison


def fallen(
    clusters: Sequence[RequestCounts], baseline: dict[str, AcceptCounts], margin: float
) -> list[str]:
    """Domains that lost more than the margin; all together err with chance ``DOUBTLESS`` (Holm
    1979)."""
    domains: dict[str, list[RequestCounts]] = {}
    for cluster in clusters:
        domains.setdefault(cluster.domain, []).append(cluster)
    compared = {domain: compare(mine, baseline) for domain, mine in domains.items()}
    chances = sorted((c.chance(margin), domain) for domain, c in compared.items() if c is not None)
    lost = []
    for position, (chance, domain) in enumerate(chances):
        if chance >= DOUBTLESS / (len(chances) - position):
            break
        lost.append(domain)
    return lost


def _baseline_strata(watch: Watch) -> dict[str, AcceptCounts]:
    return {key: AcceptCounts(**sums) for key, sums in watch.baseline["strata"].items()}


def _baseline(s: Session, watch: Watch, rules: WatchSettings) -> dict[str, Any]:
    """What the version before served until the promotion, in sums; where that is little, with
    what replay says that it would have accepted of held-out requests."""
    if watch.baseline_id is None:
        return {"keys": BASELINE_KEYS, "strata": {}, "paces": {}}
    until = watch.started_at
    since = until - timedelta(hours=rules.look_back_hours)
    clusters = queries.request_counts.request_counts(
        s, watch.group_id, watch.baseline_id,
        since=since, until=until, limit=BASELINE_REQUESTS, newest=True,
    )  # fmt: skip
    steps = queries.steps.steps_of_requests(s, [c.request_id for c in clusters], watch.baseline_id)
    live = Counter(key_of(c) for c in clusters)
    evaluation_id, replayed = _replayed(s, watch)
    request_ids = {c.request_id for c in clusters}
    more = [
        c for c in replayed if live[key_of(c)] < FEW_REQUESTS and c.request_id not in request_ids
    ]
    return {
        "keys": BASELINE_KEYS,
        "version_id": watch.baseline_id,
        "requests": len(clusters),
        "replayed": {"requests": len(more), "evaluation_id": evaluation_id} if more else None,
        "since": since.isoformat(),
        "until": until.isoformat(),
        "strata": {key: asdict(stratum) for key, stratum in strata([*clusters, *more]).items()},
        "paces": paces(steps),
    }


def _replayed(s: Session, watch: Watch) -> tuple[int | None, list[RequestCounts]]:
    """The newest gate evaluation that the version before took part in, and its requests there."""
    assert watch.baseline_id is not None
    ways = [
        (e, 4) for e in queries.evaluations.evaluations(s, watch.baseline_id)
    ]  # it was the candidate
    ways += [
        (e, 2)
        for e in queries.evaluations.evaluations(s, watch.version_id)
        if e.baseline_id == watch.baseline_id
    ]
    ways = [
        (e, column)
        for e, column in ways
        if e.kind == "replay" and not e.domain and e.depth and e.details.get("requests")
    ]
    if not ways:
        return None, []
    newest, column = max(ways, key=lambda way: way[0].id)
    rows = [row for row in newest.details["requests"] if row[column + 1]]
    rules = queries.requests.accept_rules(s, [row[0] for row in rows])
    return newest.id, [
        RequestCounts(row[0], row[1], newest.depth or 0, newest.topk or 0, newest.nodes or 0,
                row[column + 1], row[column], newest.created_at, rules[row[0]])
        for row in rows
        if rules.get(row[0])  # the others were deleted, and with them by which rule they were
    ]  # fmt: skip


def _next_window(
    s: Session,
    watch: Watch,
    windows: Sequence[WatchWindow],
    rules: WatchSettings,
    now: datetime,
) -> WatchWindow | None:
    """The row of the next window, or ``None`` while it goes on."""
    begun = _begin(s, watch, windows, now)
    clusters = queries.request_counts.request_counts(
        s, watch.group_id, watch.version_id, since=begun
    )
    if count := filled(clusters, _baseline_strata(watch), rules):
        end = clusters[count - 1].finished_at + timedelta(microseconds=1)
        return _close(s, watch, windows, begun, end, clusters[:count], rules)
    servers = queries.servers.servers(s, watch.group_id)
    if servers and all(server.phase == "off" for server in servers):
        return None  # nothing speculates, nothing can be told
    first = queries.requests.first_finished(s, watch.group_id, begun)
    if first is None:
        gone = all(is_silent(server.last_seen_at, now, LOST_SECONDS) for server in servers)
        end = begun + timedelta(seconds=rules.seconds)
        if not gone or now < end:
            return None  # no traffic is no evidence
        why = Verdict("empty", "no server of the group answers")
        return _write(s, watch, windows, begun, now, [], why)
    share = max([LEAST_SHARE, *(server.speculation_share or 0.0 for server in servers)])
    end = first + timedelta(seconds=rules.seconds / share)
    if now < end:
        return None
    inside = [c for c in clusters if c.finished_at < end]
    return _close(s, watch, windows, begun, end, inside, rules)


def _begin(s: Session, watch: Watch, windows: Sequence[WatchWindow], now: datetime) -> datetime:
    """When the next window begins. After the clock was set back that lies in the future, which
    would blind the watch until then: it begins now, once and for all."""
    begun = windows[-1].finished_at if windows else watch.started_at
    if begun <= now + timedelta(seconds=SKEW_SECONDS):
        return begun
    log.warning("the clock was set back; the watch goes on from %s", now)
    if windows:
        windows[-1].finished_at = now
    else:
        watch.started_at = now
    s.flush()
    return now


def _close(
    s: Session,
    watch: Watch,
    windows: Sequence[WatchWindow],
    begun: datetime,
    end: datetime,
    clusters: Sequence[RequestCounts],
    rules: WatchSettings,
) -> WatchWindow:
    if len(clusters) < 2:
        reason = f"requests were served, {len(clusters)} with drafts of version {watch.version_id}"
        return _write(s, watch, windows, begun, end, clusters, Verdict("empty", reason))
    earlier = queries.request_counts.request_counts(
        s, watch.group_id, watch.version_id, since=watch.started_at, until=begun
    )
    verdict, compared = judge(clusters, _baseline_strata(watch), rules, earlier)
    steps = queries.steps.steps_of_requests(s, [c.request_id for c in clusters], watch.version_id)
    before = {key: Pace(*pace) for key, pace in watch.baseline["paces"].items()}
    gain = compared.accept_length / compared.expected if compared else 1.0
    speed = speeds(paces(steps), before, gain)
    if verdict.verdict == "pass" and speed and speed[0] < (1 - rules.speed_margin) * speed[1]:
        reason = f"{verdict.reason}; {speed[0]:.1f} tokens/s of a stream, expected {speed[1]:.1f}"
        verdict = Verdict("bad", reason)
    return _write(s, watch, windows, begun, end, clusters, verdict, compared, speed)


def _write(
    s: Session,
    watch: Watch,
    windows: Sequence[WatchWindow],
    begun: datetime,
    end: datetime,
    clusters: Sequence[RequestCounts],
    verdict: Verdict,
    compared: Comparison | None = None,
    speed: tuple[float, float] | None = None,
) -> WatchWindow:
    steps = sum(c.verify_steps for c in clusters)
    accepted = sum(c.accepted for c in clusters)
    alone = or_none(accept_length(accepted, steps))  # beside nothing that it could be set against
    return queries.watches.add_watch_window(
        s,
        watch_id=watch.id,
        number=len(windows) + 1,
        started_at=begun,
        finished_at=end,
        requests=len(clusters),
        verify_steps=steps,
        accepted=accepted,
        accept_length=compared.accept_length if compared else alone,
        expected_accept_length=compared.expected if compared else None,
        tokens_per_second=speed[0] if speed else None,
        expected_tokens_per_second=speed[1] if speed else None,
        verdict=verdict.verdict,
        reason=verdict.reason,
        metrics={"compared": asdict(compared) if compared else None},
    )


def outcome(verdicts: Sequence[str], rules: WatchSettings) -> str | None:
    """Of windows with these verdicts: passed, failed, or ``None`` while it goes on."""
    wrong = [verdict for verdict in verdicts if verdict != "pass"]
    if "fail" in wrong or len(wrong) >= rules.failures:
        return "failed"
    return "passed" if len(verdicts) >= rules.windows else None


def mean_lengths(windows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """(accept length, the expected one) over the windows that could be compared, by steps."""
    weighed = [w for w in windows if w["expected_accept_length"] and w["accept_length"]]
    total = sum(w["verify_steps"] for w in weighed)

    def mean(name: str) -> float | None:
        return sum(w["verify_steps"] * w[name] for w in weighed) / total if total else None

    return mean("accept_length"), mean("expected_accept_length")


def _conclude(
    engine: Engine, watch: Watch, windows: Sequence[WatchWindow], rules: WatchSettings
) -> WatchStatus:
    ended = outcome([row.verdict for row in windows], rules)
    last = windows[-1].reason
    with store.session(engine) as s:
        name = queries.groups.group(s, watch.group_id).name
        _mark(s, watch, windows, "pass" if ended == "passed" else "fail")
    reason = f"{len(windows)} windows, the last: {last}"
    if ended == "failed":
        evidence = {"watch_id": watch.id, "windows": [_plain(window) for window in windows]}
        try:
            change = rollback(
                engine,
                name,
                actor="watch",
                reason=f"version {watch.version_id}: {last}",
                expected_live=watch.version_id,
                evidence=evidence,
            )
            reason = f"{last}; version {change.version_id} is live again"
        except Refused as refusal:
            reason = f"{last}; no rollback: {refusal}"
        except AuroraError as error:
            reason = f"{last}; the rollback failed: {error}"
        log.warning("watch over version %d: %s", watch.version_id, reason)
    with store.session(engine) as s:
        watches = queries.watches.watches(s, watch.group_id)
        row = next(each for each in watches if each.id == watch.id)
        queries.watches.end_watch(s, row, str(ended), reason)
        return WatchStatus(row, queries.watches.watch_windows(s, row.id))


def _mark(s: Session, watch: Watch, windows: Sequence[WatchWindow], verdict: str) -> None:
    """The version's evaluation by live traffic; once a watch."""
    evaluations = queries.evaluations.evaluations(s, watch.version_id)
    if any(e.kind == "live" and e.details.get("watch_id") == watch.id for e in evaluations):
        return
    length, expected = mean_lengths([_plain(window) for window in windows])
    queries.evaluations.add_evaluation(
        s,
        candidate_id=watch.version_id,
        baseline_id=watch.baseline_id,
        kind="live",
        requests=sum(w.requests for w in windows),
        verdict=verdict,
        candidate_accept_length=length,
        baseline_accept_length=expected,
        difference=length - expected if length and expected else None,
        details={"watch_id": watch.id, "generation": watch.generation,
                 "windows": [_plain(window) for window in windows]},
    )  # fmt: skip


def _plain(window: WatchWindow) -> dict[str, Any]:
    return {
        "number": window.number,
        "requests": window.requests,
        "verify_steps": window.verify_steps,
        "accept_length": window.accept_length,
        "expected_accept_length": window.expected_accept_length,
        "tokens_per_second": window.tokens_per_second,
        "expected_tokens_per_second": window.expected_tokens_per_second,
        "verdict": window.verdict,
        "reason": window.reason,
    }
