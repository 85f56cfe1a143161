"""The held-out prompts of a demo: what the first and the last drafter reach on them."""

from __future__ import annotations

import itertools
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.demo.measurement import WholeDrafts, whole_drafts
from aurora_sgl.demo.prompts import Prompt
from aurora_sgl.demo.screen import Screen
from aurora_sgl.demo.summary import number, rounded, speed
from aurora_sgl.demo.traffic import TrafficSample, measure
from aurora_sgl.draft_shape import DraftShape

TOKENS = 40  # of one measured answer


class HeldOutPrompts:
    """Measures by name ("first", "last", ...) and keeps what was found."""

    def __init__(
        self,
        url: str,
        engine: Engine,
        screen: Screen,
        prompts: list[Prompt],
        shape: DraftShape,
        temperature: float,
    ) -> None:
        self.url, self.engine, self.screen = url, engine, screen
        self.prompts, self.shape, self.temperature = prompts, shape, temperature
        self.speeds: dict[str, TrafficSample] = {}
        self.lengths: dict[str, WholeDrafts] = {}
        self.failed = 0

    async def _serve(self, label: str, drafts: str) -> TrafficSample:
        total, numbers = len(self.prompts), itertools.count(1)
        sample = await measure(
            self.url,
            self.prompts,
            lambda one: self.screen.bar(label, next(numbers), total),
            drafts=drafts,
            tokens=TOKENS,
            temperature=self.temperature,
        )
        self.screen.end_bar(label)
        self.failed += sample.failed
        return sample

    async def measure_speed(self, name: str, *, drafts: str = "") -> None:
        """Tokens per second, with drafts as the server decides."""
        what = name.replace("_", " ")
        sample = self.speeds[name] = await self._serve(f"measuring {what}", drafts)
        shown = self.screen.speeds[what] = speed(sample.tokens_per_second)
        self.screen.say(f"held-out prompts, {what}: {shown} tokens/s")

    async def serve_whole_drafts(self, name: str) -> TrafficSample:
        """The prompts with whole drafts in every step; ``is_stored`` then has the accept length."""
        return await self._serve(f"measuring accept length, {name}", "whole")

    def is_stored(self, name: str, sample: TrafficSample) -> bool:
        """Whether the store has all requests of a sample; its accept length is kept then."""
        with store.session(self.engine, write=False) as s:
            counts = whole_drafts(s, sample, self.prompts, self.shape)
        if counts is None:
            return False
        self.lengths[name] = counts
        shown = number(counts.accept_length)
        self.screen.say(f"held-out prompts, {name}: accept length {shown} with whole drafts")
        return True

    def accept_length(self, first: str, last: str) -> dict[str, Any]:
        """Two accept lengths and the interval of their difference on the same prompts."""
        paired = self.lengths[first].difference(self.lengths[last])
        return {
            "first": rounded(paired.baseline),
            "last": rounded(paired.candidate),
            "difference": rounded(paired.difference),
            "ci_low": rounded(paired.ci_low),
            "ci_high": rounded(paired.ci_high),
            "requests": paired.requests,
            "shape": {name: getattr(self.shape, name) for name in ("depth", "topk", "nodes")},
        }

    def tokens_per_second(self) -> dict[str, float | None]:
        """What each measured speed came to, by name."""
        return {name: rounded(sample.tokens_per_second) for name, sample in self.speeds.items()}


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """The first ``count`` distinct prompts, taken from the domains in turn."""
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in {prompt.prompt: prompt for prompt in prompts}.values():
        by_domain.setdefault(prompt.domain, []).append(prompt)
    turns = itertools.zip_longest(*by_domain.values())
    return [prompt for turn in turns for prompt in turn if prompt is not None][:count]
