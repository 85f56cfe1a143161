"""The share of steps with drafts stays within its bound, and labels reach the scheduler."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from aurora_sgl.engine import labels
from aurora_sgl.engine.policy import SpeculationPolicy


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("streams", [1, 8])
def test_steps_with_drafts_stay_near_their_share(share: float, streams: int) -> None:
    rng = random.Random(0)
    policy = SpeculationPolicy(share)
    running: list[tuple[int, bool]] = []  # steps left, speculates
    for _ in range(20_000):
        while len(running) < streams:
            running.append((rng.randint(20, 100), policy.admit()))
        drafts = any(speculates for _, speculates in running)
        policy.account(speculative=drafts, batch_size=streams, seconds=0.001)
        running = [(left - 1, speculates) for left, speculates in running if left > 1]
    part = policy.speculative_steps / (policy.speculative_steps + policy.plain_steps)
    if share in (0.0, 1.0):
        assert part == share
    else:
        assert 0.3 * share <= part <= share + 0.02


def test_step_times_are_compared_at_one_batch_size_only_when_both_kinds_are_known() -> None:
    policy = SpeculationPolicy(0.5)
    for _ in range(20):
        policy.account(speculative=False, batch_size=1, seconds=0.010)
        policy.account(speculative=True, batch_size=8, seconds=0.080)
    assert "step_ms_plain" not in policy.counters()
    for _ in range(10):
        policy.account(speculative=True, batch_size=1, seconds=0.014)
    assert policy.counters()["step_ms_plain"] == pytest.approx(10.0)
    assert policy.counters()["step_ms_spec"] == pytest.approx(14.0)


def serve_with_headers(headers: dict[str, str], params: SimpleNamespace, warmup: bool) -> None:
    async def app(scope, receive, send) -> None:
        labels.attach(params, warmup=warmup)

    scope = {
        "type": "http",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    # In a thread of its own: a browser that other tests drive keeps a loop in this one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, labels.HeaderMiddleware(app)(scope, None, None)).result()


def test_headers_become_labels_beside_the_clients_own_parameters() -> None:
    params = SimpleNamespace(custom_params={"mine": 1})
    headers = {
        "x-aurora-domain": "code",
        "x-aurora-train": "No",
        "x-aurora-speculate": "yes",
        "x-aurora-conversation": "abc",
        "content-type": "text/plain",
    }
    serve_with_headers(headers, params, warmup=False)
    assert params.custom_params["mine"] == 1
    assert labels.read(params) == labels.Labels("code", "abc", False, True, False)


def test_without_headers_nothing_is_attached_and_defaults_are_read() -> None:
    params = SimpleNamespace(custom_params=None)
    serve_with_headers({}, params, warmup=False)
    assert params.custom_params is None
    assert labels.read(params) == labels.Labels()


def test_warm_ups_are_marked() -> None:
    params = SimpleNamespace(custom_params=None)
    serve_with_headers({}, params, warmup=True)
    assert labels.read(params).warmup


def test_labels_that_a_client_forges_in_its_parameters_are_bounded() -> None:
    params = SimpleNamespace(custom_params={"aurora": {"domain": "x" * 500, "train": "maybe"}})
    said = labels.read(params)
    assert len(said.domain) == 64 and said.may_train is None
