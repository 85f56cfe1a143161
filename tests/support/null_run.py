"""A demo that learns nothing: its first and its last measurement must not be told apart."""

from __future__ import annotations

import asyncio
from itertools import combinations

from aurora_sgl import store
from aurora_sgl.demo.measurement import WholeDrafts, whole_drafts
from aurora_sgl.demo.prompts import sample_prompts, to_measure
from aurora_sgl.demo.traffic import measure, send_all
from aurora_sgl.draft_shape import DraftShape
from tests.e2e.conftest import Running, until

MEASURED, TOKENS, RUNS = 6, 8, 7


def assert_null_runs_cover_zero(running: Running, shape: tuple[int, int, int]) -> None:
    """Seven measurements of one drafter, on a server that moves between draft shapes meanwhile:
    of their 21 pairs the interval of the difference covers zero in at least twenty."""
    measured = []
    for number in range(RUNS):
        measured.append(_lengths(running, DraftShape(*shape)))
        _traffic(running, streams=1 + number % 4)
    told_apart = 0
    for first, last in combinations(measured, 2):
        difference = first.difference(last)
        assert difference.requests == MEASURED
        told_apart += not difference.ci_low <= 0 <= difference.ci_high
    assert told_apart <= 1, f"{told_apart} of 21 null runs saw a difference"


def _lengths(running: Running, shape: DraftShape) -> WholeDrafts:
    prompts = to_measure(sample_prompts())[:MEASURED]
    sample = asyncio.run(
        measure(running.url, prompts, lambda one: None, drafts="whole", tokens=TOKENS)
    )

    def stored() -> WholeDrafts | None:
        with store.session(running.engine, write=False) as s:
            return whole_drafts(s, sample, prompts, shape)

    return until(stored, 30, "the measured requests in the store")


def _traffic(running: Running, streams: int) -> None:
    """What makes the server's policy move: drafts in the shape that pays, at another load."""
    prompts = to_measure(sample_prompts())[-streams:]
    headers = {"x-aurora-speculate": "yes"}
    asyncio.run(
        send_all(running.url, prompts, lambda one: None, max_tokens=6, headers=headers,
                 streams=streams)
    )  # fmt: skip
