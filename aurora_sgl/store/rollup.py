"""Sums over verify steps: arithmetic only, no SQL. See ``AcceptanceMinute`` for what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from aurora_sgl.batch_sizes import batch_bucket
from aurora_sgl.wire import VerifyStep

MINUTE_US = 60_000_000


class MinuteKey(NamedTuple):
    """Key columns of ``acceptance_minute`` but for the server; the minute in microseconds."""

    minute_us: int
    drafter_version_id: int
    domain: str
    depth: int
    topk: int
    nodes: int  # 0: not known, in rows from before schema 0008
    accept_rule: str
    batch_bucket: int
    mixed: bool


class TallyKey(NamedTuple):
    """Key of ``request_tally``: the cluster of a ratio's interval."""

    request_id: int
    drafter_version_id: int
    depth: int
    topk: int
    nodes: int  # 0: not known, in rows from before schema 0008
    mixed: bool


class WideKey(NamedTuple):
    """A cluster over all draft shapes; ``mixed`` ``None``: of steps that are and that are not."""

    request_id: int
    drafter_version_id: int
    mixed: bool | None


@dataclass(slots=True)
class Tally:
    """Steps and accepted proposals of one cluster, as they are after the new steps."""

    verify_steps: int = 0
    accepted: int = 0


@dataclass(slots=True)
class ClusterSums:
    """What new steps add to the number of clusters and to the sums over them."""

    requests: int = 0
    sum_steps_squared: int = 0
    sum_accepted_squared: int = 0
    sum_steps_accepted: int = 0

    def add_step(self, cluster: Tally, accepted: int) -> None:
        """A cluster with n steps and y accepted that takes one more step with a accepted grows n^2
        by 2n + 1, y^2 by 2ya + a^2 and ny by na + y + a."""
        n, y, a = cluster.verify_steps, cluster.accepted, accepted
        self.requests += n == 0
        self.sum_steps_squared += 2 * n + 1
        self.sum_accepted_squared += 2 * y * a + a * a
        self.sum_steps_accepted += n * a + y + a
        cluster.verify_steps, cluster.accepted = n + 1, y + a


@dataclass(slots=True)
class Minute:
    """The sums that new steps add to one row."""

    verify_steps: int = 0
    proposed: int = 0
    accepted: int = 0
    completion_tokens: int = 0
    histogram: list[int] = field(default_factory=list)
    by_shape: ClusterSums = field(default_factory=ClusterSums)
    by_version: ClusterSums = field(default_factory=ClusterSums)
    whole: ClusterSums = field(default_factory=ClusterSums)

    def sums(self) -> dict[str, int]:
        """By the names of their columns."""
        values = {name: getattr(self, name) for name in PLAIN_SUMS}
        for prefix, clusters in zip(
            CLUSTERS, (self.by_shape, self.by_version, self.whole), strict=True
        ):
            values |= {prefix + name: getattr(clusters, name) for name in CLUSTER_SUMS}
        return values


#: ``request.accept_rule`` of a request whose steps had several.
MIXED = "mixed"
PLAIN_SUMS = ("verify_steps", "proposed", "accepted", "completion_tokens")
CLUSTER_SUMS = tuple(ClusterSums.__dataclass_fields__)
#: Prefixes of the columns: clusters of one draft shape, of all shapes, and of mixed steps too.
CLUSTERS = ("", "version_", "any_")


@dataclass(slots=True)
class RequestSums:
    """What new steps add to one request."""

    verify_steps: int = 0
    proposed: int = 0
    accepted: int = 0
    kept: int = 0
    accept_rule: str = ""  # of its steps; ``MIXED``: of several


def tally_key(step: VerifyStep, version_id: int) -> TallyKey:
    return TallyKey(step.request_id, version_id, step.depth, step.topk, step.nodes, step.mixed)


def add_lists(one: list[int], other: list[int]) -> list[int]:
    """Element by element; the shorter one counts as zeros there."""
    if len(one) < len(other):
        one, other = other, one
    return [value + (other[i] if i < len(other) else 0) for i, value in enumerate(one)]


def per_position(histogram: list[int]) -> list[int]:
    """How many steps accepted a proposal at depth 1, 2, ...: sums to the accepted proposals."""
    counts, total = [], 0
    for steps in reversed(histogram[1:]):
        total += steps
        counts.append(total)
    return counts[::-1]


def roll_up(
    steps: Iterable[VerifyStep],
    boot_version_id: int,
    domains: dict[int, str],
    tallies: dict[TallyKey, Tally],
) -> tuple[dict[MinuteKey, Minute], dict[int, RequestSums]]:
    """Sum new steps by minute and by request; ``tallies`` must hold all clusters of these requests
    as stored, and is counted on."""
    wide = _over_shapes(tallies)
    minutes: dict[MinuteKey, Minute] = {}
    requests: dict[int, RequestSums] = {}
    for step in steps:
        version_id = step.version_id or boot_version_id
        key = MinuteKey(
            step.at_us - step.at_us % MINUTE_US,
            version_id,
            domains[step.request_id],
            step.depth,
            step.topk,
            step.nodes,
            step.accept_rule,
            batch_bucket(step.batch_size),
            step.mixed,
        )
        minute = minutes.get(key)
        if minute is None:
            minute = minutes[key] = Minute()
        a = step.accepted
        minute.by_shape.add_step(tallies.setdefault(tally_key(step, version_id), Tally()), a)
        if step.depth > 0:
            for clusters, mixed in ((minute.by_version, step.mixed), (minute.whole, None)):
                cluster = WideKey(step.request_id, version_id, mixed)
                clusters.add_step(wide.setdefault(cluster, Tally()), a)
        minute.verify_steps += 1
        minute.proposed += step.proposed
        minute.accepted += a
        minute.completion_tokens += step.kept
        if len(minute.histogram) <= a:
            minute.histogram.extend([0] * (a + 1 - len(minute.histogram)))
        minute.histogram[a] += 1
        sums = requests.get(step.request_id)
        if sums is None:
            sums = requests[step.request_id] = RequestSums()
        sums.verify_steps += 1
        sums.proposed += step.proposed
        sums.accepted += a
        sums.kept += step.kept
        sums.accept_rule = step.accept_rule if sums.accept_rule in ("", step.accept_rule) else MIXED
    return minutes, requests


def _over_shapes(tallies: Mapping[TallyKey, Tally]) -> dict[WideKey, Tally]:
    """Steps with drafts only."""
    sums: dict[WideKey, Tally] = {}
    for key, tally in tallies.items():
        if key.depth == 0:
            continue
        for mixed in (key.mixed, None):
            cluster = WideKey(key.request_id, key.drafter_version_id, mixed)
            total = sums.setdefault(cluster, Tally())
            total.verify_steps += tally.verify_steps
            total.accepted += tally.accepted
    return sums
