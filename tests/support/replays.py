"""Replays of requests as the gate gets them."""

from __future__ import annotations

from dataclasses import replace

from aurora_sgl.evaluation.replay import RequestReplay


def replayed(
    count: int, accepted: int, *, domain: str = "chat", first: int = 1
) -> list[RequestReplay]:
    """Requests of 40 steps that accept this much each, give or take two."""
    return [
        RequestReplay(number, 40, accepted + number % 5 - 2, domain)
        for number in range(first, first + count)
    ]


def more(replays: list[RequestReplay], accepted: int) -> list[RequestReplay]:
    """The same requests under a version that accepts so much more of each, or up to two beyond."""
    return [replace(one, accepted=one.accepted + accepted + one.request_id % 3) for one in replays]
