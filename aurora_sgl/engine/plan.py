"""What the leading rank chose for a request, carried on the request itself to every rank.

Between the ranks SGLang pickles requests, so that one field of theirs can hold an object. No client
can send one: what comes over HTTP is text and numbers. Each rank takes it off again before SGLang
reads the request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from aurora_sgl.engine.labels import UNKNOWN, Labels

_MOST_WAITING = 65_536  # requests that were aborted before their prefill stay until others follow


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """What is done with one request."""

    speculates: bool
    keeps: float = 0.0  # steps for which it keeps its drafts even where they lose
    traced: bool = False
    ticket: int = 0  # of the bytes that are reserved for its trace on the leading rank
    turn: int = 0  # key of a turn of a conversation, see ``conversations``
    renews: bool = False  # it uses no cached prefix: see ``renewal``
    labels: Labels = UNKNOWN


@dataclass(frozen=True, slots=True)
class _Carried:
    plan: RequestPlan
    custom_params: Any  # what stood in the field


def requests(received: Iterable[Any]) -> Iterator[Any]:
    """The generation requests among what a scheduler received, those of batches one by one."""
    for one in received:
        name = type(one).__name__
        if name == "TokenizedGenerateReqInput":
            yield one
        elif name == "BatchTokenizedGenerateReqInput":
            yield from one


def put(request: Any, plan: RequestPlan) -> None:
    params = request.sampling_params
    params.custom_params = _Carried(plan, params.custom_params)


def take(request: Any) -> RequestPlan | None:
    """The plan that :func:`put` put there, which leaves the request as it was."""
    params: Any = getattr(request, "sampling_params", None)
    carried = getattr(params, "custom_params", None)
    if not isinstance(carried, _Carried):
        return None
    params.custom_params = carried.custom_params
    return carried.plan


class Plans:
    """Plans of requests that wait for their prefill, on each rank."""

    def __init__(self, without: RequestPlan) -> None:
        self._without = without  # for a request for which nothing was chosen
        self._waiting: OrderedDict[int, RequestPlan] = (
            OrderedDict()
        )  # a client's rid can be megabytes

    def keep(self, rid: object, plan: RequestPlan) -> None:
        self._waiting[hash(rid)] = plan
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popitem(last=False)

    def keep_unchosen(self, rid: object, labels: Labels) -> None:
        """For a request for which the leading rank chose nothing. Ranks may read other labels:
        nothing of what they do in a step follows from these."""
        self.keep(rid, replace(self._without, labels=replace(labels, whole=False, warmup=False)))

    def pop(self, rid: object) -> RequestPlan:
        return self._waiting.pop(hash(rid), self._without)
