"""Whether the accept length of the live version falls, domain by domain and accept rule by rule.

The Page-Hinkley test (Page, Biometrika 1954; from the package river), one value a request: the
tokens accepted a step, in standard deviations. Steps of one request are
correlated, so a step is no value of its own. Over simulated requests that differ as served ones
do, 1,000 without a change raised a false alarm in 3% of 200 tries, and a fall of the accept length
from 2.0 to 1.7 was seen after 43 requests (median; 22 for a fall to 1.5). ADWIN at its default
raised none, and needed more than 400 for the first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import mean, pstdev
from typing import Any

from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.store.models import Drift
from aurora_sgl.store.queries.request_counts import RequestCounts

#: Requests of one domain before anything is said of it: they give the standard deviation.
WARM_UP = 30
#: Requests of one domain that are remembered to say what was before.
MEMORY = 2000
#: Smallest standard deviation: a domain whose requests are all alike is not judged by a hair.
LEAST_DEVIATION = 0.05


@dataclass(frozen=True)
class Fall:
    """A fall of the accept length, seen at one request."""

    domain: str
    last_request_id: int
    began_at: datetime  # when the first request after the change finished
    detected_at: datetime  # when the request at which it was seen finished
    accept_length_before: float
    accept_length_after: float
    requests_before: int
    requests_after: int
    details: dict[str, Any]


@dataclass
class _Stream:
    """Requests of one domain, accept rule and draft shape since the last fall."""

    detector: Any = None
    deviation: float = 0.0
    requests: deque[RequestCounts] = field(default_factory=lambda: deque(maxlen=MEMORY))


def was_told(fall: Fall, stored: Iterable[Drift]) -> bool:
    """Whether a detector that read the same requests before, perhaps from another start, has
    stored this fall: its last request finished when this one had begun, or later. The times are
    those of the requests, never this machine's clock."""
    same = (fall.domain, *(fall.details[name] for name in ("depth", "topk", "nodes")))
    return any(
        (one.domain, *(one.details.get(name) for name in ("depth", "topk", "nodes"))) == same
        and one.details.get("accept_rule", fall.details["accept_rule"])  # older ones name none
        == fall.details["accept_rule"]
        and datetime.fromisoformat(one.details["last_finished_at"]) >= fall.began_at
        for one in stored
        if "last_finished_at" in one.details
    )


class DriftDetector:
    """Falls of one version's accept length; a new version needs a new detector."""

    def __init__(self, threshold: float, slack: float) -> None:
        """Both in standard deviations of a request: how far the sum may fall below its peak, and
        how much of a difference counts as none."""
        self._threshold, self._slack = threshold, slack
        self._streams: dict[tuple[str, str, int, int, int], _Stream] = {}

    def feed(self, requests: Iterable[RequestCounts]) -> list[Fall]:
        """The next requests in the order in which they finished; the falls seen in them."""
        return [fall for request in requests if (fall := self._take(request)) is not None]

    def _take(self, request: RequestCounts) -> Fall | None:
        key = (
            *(request.domain, request.accept_rule),
            *(request.depth, request.topk, request.nodes),
        )
        stream = self._streams.setdefault(key, _Stream())
        stream.requests.append(request)
        if stream.detector is None:
            if len(stream.requests) == WARM_UP:
                self._begin(stream)
            return None
        stream.detector.update(_value(stream.requests[-1]) / stream.deviation)
        if not stream.detector.drift_detected:
            return None
        requests = list(stream.requests)
        change_point = self._change_point(requests, stream.deviation)
        before, after = requests[:change_point], requests[change_point:]
        self._streams[key] = _Stream(requests=deque(after, maxlen=MEMORY))
        if len(after) >= WARM_UP:
            self._begin(self._streams[key])
        return Fall(
            domain=request.domain,
            last_request_id=request.request_id,
            began_at=after[0].finished_at,
            detected_at=request.finished_at,
            accept_length_before=_accept_length(before),
            accept_length_after=_accept_length(after),
            requests_before=len(before),
            requests_after=len(after),
            details={
                "detector": "river.drift.PageHinkley",
                "threshold": self._threshold,
                "slack": self._slack,
                "deviation": stream.deviation,
                "accept_rule": request.accept_rule,
                "depth": request.depth,
                "topk": request.topk,
                "nodes": request.nodes,
                "last_finished_at": request.finished_at.isoformat(),
            },
        )

    def _begin(self, stream: _Stream) -> None:
        from river.drift.page_hinkley import PageHinkley

        values = [_value(each) for each in stream.requests]
        stream.deviation = max(pstdev(values), LEAST_DEVIATION)
        stream.detector = PageHinkley(
            min_instances=WARM_UP,
            delta=self._slack,
            threshold=self._threshold,
            alpha=1.0,  # forgets nothing
            mode="down",
        )
        for value in values:
            stream.detector.update(value / stream.deviation)

    def _change_point(self, requests: Sequence[RequestCounts], deviation: float) -> int:
        """Where the fall begins: behind the peak of the sum that the test watches."""
        values = [_value(each) for each in requests]
        level, total, peak, change_point = mean(values), 0.0, 0.0, 1
        for number, value in enumerate(values[:-1], start=1):
            total += (value - level) / deviation
            if total > peak:
                peak, change_point = total, number
        return change_point


def _value(request: RequestCounts) -> float:
    return request.accepted / request.verify_steps


def _accept_length(requests: Sequence[RequestCounts]) -> float:
    return AcceptCounts.of(requests).accept_length
