"""Replay and the server agree on the accept length of the same drafter on the same requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_sgl import store
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.replay import replay_one
from aurora_sgl.rollout.promote import rollback
from aurora_sgl.sequences import dataset
from aurora_sgl.sequences.trace_cache import TraceFiles
from aurora_sgl.store import queries
from tests.e2e.conftest import TREE, Running, until
from tests.e2e.test_records import serve
from tests.e2e.test_swap import a_relative, artifacts, flush, go_live, server_group


def replayed_and_served(
    server: Running, model: Path, request_ids: list[int], version_id: int
) -> tuple[float, float, int]:
    """(replayed accept length, served one, requests) of one version on the same requests.

    Replay leaves out steps whose draft runs past the end of the answer, because nothing is known
    there; the same steps are left out of what was served.
    """
    with store.session(server.engine, write=False) as s:
        rows = queries.requests.recent_requests(s, server.group_id, limit=2000)
        uri = queries.versions.version(s, version_id).weights_uri
    drafter = checkpoint.load(artifacts(server).local_path(uri)).float().eval()
    built = dataset.build(
        [row for row in rows if row.request_id in request_ids],
        TraceFiles(artifacts(server), server.home / "cache"),
        drafter.config,
        dev_share=0.0,
        gate_share=0.0,
        donors=rows,
    )
    head = TargetHead.load(model)
    shape = DraftShape(*TREE)
    steps = accepted = served_steps = served_accepted = 0
    for sequence in built.train:
        with torch.no_grad():
            one = replay_one(drafter, sequence, shape, head)
        steps += one.verify_steps
        accepted += one.accepted
        for event in server.events(sequence.request_id)[: one.verify_steps]:
            assert event["drafter_version_id"] == version_id and not event["mixed"]
            served_steps += 1
            served_accepted += event["accepted"]
    return 1 + accepted / steps, 1 + served_accepted / served_steps, len(built.train)


def serve_some(server: Running, prompts: list[list[int]], **sampling: Any) -> list[int]:
    """Ids of the requests, which run six at a time once the first has left what they begin with in
    the prefix cache: a step of six takes hardly longer than one of one."""
    flush(server)  # what earlier tests left there is of their drafters

    def one(prompt: list[int]) -> int:
        return int(serve(server, prompt, max_new_tokens=28, **sampling)[1].id)

    ids = [one(prompts[0])]
    with ThreadPoolExecutor(6) as pool:
        ids += pool.map(one, prompts[1:])

    def traced() -> bool:
        with store.session(server.engine, write=False) as s:
            return all(queries.traces.trace(s, request_id) is not None for request_id in ids)

    until(traced, 30, "the traces")
    return ids


def test_replayed_and_served_accept_length_agree_with_a_warm_radix_cache(
    server: Running, model: Path, prompts: list[list[int]]
) -> None:
    """All chat prompts share the template's system prompt, which is cached after the first."""
    version = server.live_version()
    assert version is not None
    ids = serve_some(server, prompts[:12])
    replayed, served, requests = replayed_and_served(server, model, ids, version)
    assert requests == 12
    assert served > 1.1
    assert abs(replayed / served - 1) < 0.02


def test_they_agree_for_sampled_requests_too(
    server: Running, model: Path, prompts: list[list[int]]
) -> None:
    """A sampled answer is the target's own draw, whatever was proposed: along its log replay knows
    what was accepted."""
    version = server.live_version()
    assert version is not None
    ids = serve_some(server, prompts[:12], temperature=0.8)
    replayed, served, requests = replayed_and_served(server, model, ids, version)
    assert requests == 12
    assert {server.events(each)[0]["accept_rule"] for each in ids} == {"target_sampling"}
    assert served > 1.05
    assert abs(replayed / served - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "sampling"),
    [("grammar", {"regex": "[A-Z][a-z ,.]{60,80}"}), ("logit_bias", {"logit_bias": {"28": 4.0}})],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_they_agree_under_a_grammar_and_a_bias(
    server: Running, model: Path, prompts: list[list[int]], temperature: float, name: str,
    sampling: dict[str, Any],
) -> None:  # fmt: skip
    """Both change the target's logits at each node of a draft by what stands before it alone."""
    version = server.live_version()
    assert version is not None
    ids = serve_some(server, prompts[:8], temperature=temperature, **sampling)
    with store.session(server.engine, write=False) as s:
        rows = [queries.requests.request(s, each) for each in ids]
    assert all(row is not None and row.sampling[name] is True for row in rows)
    replayed, served, requests = replayed_and_served(server, model, ids, version)
    assert requests == 8
    assert abs(replayed / served - 1) < 0.02


def test_they_agree_across_a_swap_for_requests_that_are_prefilled_after_it(
    server: Running, model: Path, trained: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    other = a_relative(server, trained, tmp_path / "near", 0.99)
    before = server.live_version()
    go_live(server, other)
    try:
        ids = serve_some(server, prompts[:12])
        replayed, served, requests = replayed_and_served(server, model, ids, other)
        assert requests == 12
        assert abs(replayed / served - 1) < 0.02
    finally:
        rollback(server.engine, server_group(server), actor="test", reason="undo")
        until(lambda: server.live_version() == before, 30, "the rollback")
