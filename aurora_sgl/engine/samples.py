"""Several answers to one prompt (``n``): SGLang first sends the prompt alone, so that the samples
find it in the prefix cache, and then each of them, all under ids of its own making.

The request of the prompt alone is nobody's: it is not recorded. But where samples are traced, the
rows of the prompt are computed with it and never again. So its trace goes on as that of the first
sample that comes.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aurora_sgl.engine.request_state import RequestState

#: Seconds that a prompt waits for its first sample. They come within one round of SGLang's loop;
#: when the client went away in between, they don't.
PATIENCE = 30.0


@dataclass(slots=True)
class _Prompt:
    state: RequestState
    request: weakref.ref[Any]
    since: float | None = None  # when its prefill was over


class Prompts:
    """Prompts that were computed alone, with a trace, on the leading rank."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, _Prompt] = {}  # by the token of their samples
        self._claimed: dict[int, _Prompt] = {}  # by the hash of the sample's id

    def begin(self, request: Any, state: RequestState) -> None:
        self._waiting[state.labels.samples] = _Prompt(state, weakref.ref(request))

    def done(self, state: RequestState) -> None:
        """Its prefill is over; its samples come now."""
        if prompt := self._waiting.get(state.labels.samples):
            prompt.since = self._clock()

    def claim(self, samples: str, rid: object) -> bool:
        """Whether a sample that comes in goes on with the trace of its prompt: the first one."""
        prompt = self._waiting.get(samples)
        if prompt is None or prompt.since is None or not _is_open(prompt.state):
            return False
        self._claimed[hash(rid)] = self._waiting.pop(samples)
        return True

    def take(self, rid: object) -> RequestState | None:
        """The prompt of a sample that begins."""
        prompt = self._claimed.pop(hash(rid), None)
        return prompt.state if prompt is not None and _is_open(prompt.state) else None

    def forget_old(self) -> list[RequestState]:
        """Those for which no sample came: their traces are over."""
        return self._without_old(self._waiting) + self._without_old(self._claimed)

    def _without_old(self, prompts: dict[Any, _Prompt]) -> list[RequestState]:
        keys = [key for key, prompt in prompts.items() if self._is_old(prompt)]
        return [prompts.pop(key).state for key in keys]

    def _is_old(self, prompt: _Prompt) -> bool:
        if prompt.since is None:
            return prompt.request() is None
        return self._clock() - prompt.since > PATIENCE


def _is_open(state: RequestState) -> bool:
    return state.trace is not None and not state.trace.broken
