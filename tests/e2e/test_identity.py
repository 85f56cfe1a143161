"""Speculation is lossless: greedy float32 output is the target's own, token by token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.engine.step_shape import shapes_within
from aurora_sgl.sequences import dataset
from aurora_sgl.sequences.trace_cache import TraceFiles
from aurora_sgl.store import queries
from aurora_sgl.store.models import AcceptanceEvent
from tests.e2e.conftest import Running, start, until
from tests.e2e.test_sampling import assert_targets_law
from tests.support.null_run import assert_null_runs_cover_zero

TOKENS = 20


#: Two logits of around 15 that lie this near are one in float32 sums of 576 terms: with a cache
#: Hugging Face's own ``generate`` takes the other of two that are 1e-5 apart (prompt 0, token 76).
TIE = 5e-5


def assert_greedy(hugging_face: Any, prompt: list[int], output: list[int]) -> None:
    """Every output token is the argmax of Hugging Face's float32 logits, given those before; of
    two that tie it may be either."""
    with torch.no_grad():
        logits = hugging_face(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    best, wanted = logits.max(-1)
    short = best - logits.gather(-1, torch.tensor(output)[:, None])[:, 0]
    wrong = [
        (at, token, int(wanted[at]), float(short[at]))
        for at, token in enumerate(output)
        if token != int(wanted[at]) and float(short[at]) > TIE
    ]
    assert not wrong, f"(place, token, wanted, short of it by): {wrong}"


def serve_and_compare(
    running: Running,
    prompts: list[list[int]],
    hugging_face: Any,
    headers: dict[str, str] | None = None,
) -> float:
    """Serve all prompts, eight at a time; returns the accept length of the run."""

    def one(ids: list[int]) -> dict[str, Any]:
        return running.generate(ids, headers=headers, max_new_tokens=TOKENS)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_greedy(hugging_face, prompt, answer["output_ids"])
    infos = [answer["meta_info"] for answer in answers]
    return 1 + sum(i["spec_num_correct_drafts"] for i in infos) / sum(
        i["spec_verify_ct"] for i in infos
    )


def shapes_served(running: Running) -> set[tuple[int, int]]:
    """(depth, nodes) of the steps with drafts in the store."""

    def seen() -> set[tuple[int, int]]:
        with store.session(running.engine, write=False) as s:
            found = s.execute(select(AcceptanceEvent.depth, AcceptanceEvent.nodes).distinct())
            return {(depth, nodes) for depth, nodes in found if depth}

    return until(seen, 20, "verify steps in the store")


def assert_steps_without_drafts_leave_none_behind(running: Running, model: Path) -> None:
    """A server that times a plain step among steps with drafts keeps their draft KV: what follows
    is what the drafter proposes for the whole text."""
    with store.session(running.engine, write=False) as s:
        rows = queries.requests.recent_requests(s, running.group_id, limit=500)
        uri = queries.versions.version(s, running.live_version() or 0).weights_uri
    artifacts = ArtifactRoot(str(running.home / "artifacts"))
    drafter = checkpoint.load(artifacts.local_path(uri)).float().eval()
    files = TraceFiles(artifacts, running.home / "cache")
    built = dataset.build(
        rows, files, drafter.config, dev_share=0.0, gate_share=0.0, donors=rows
    )  # fmt: skip
    head = TargetHead.load(model)
    after = same = 0
    for sequence in built.train:
        events = running.events(sequence.request_id)
        kinds = [event["depth"] > 0 for event in events]
        if all(kinds) or not any(kinds) or any(event["mixed"] for event in events):
            continue
        for event in events[kinds.index(False) :]:
            root = torch.tensor([event["position"] - 1])
            if not event["depth"] or int(root) > sequence.rows:
                continue
            shape = DraftShape(event["depth"], event["topk"], event["nodes"])
            with torch.no_grad():
                (draft,) = drafter.propose(sequence.tokens, sequence.features, root, shape, head)
            after += 1
            same += list(draft.tokens) == event["draft_tokens"]
    assert after >= 10, "plain steps among steps with drafts"
    assert same >= 0.95 * after, (same, after)


def test_eagle3_trees_give_hugging_faces_tokens(
    server: Running, prompts: list[list[int]], hugging_face: Any
) -> None:
    assert serve_and_compare(server, prompts, hugging_face) > 1.1  # drafts were accepted


def test_plain_steps_of_a_speculating_server_give_hugging_faces_tokens(
    server: Running, prompts: list[list[int]], hugging_face: Any
) -> None:
    plain = {"x-aurora-speculate": "no"}

    def one(ids: list[int]) -> dict[str, Any]:
        return server.generate(ids, headers=plain, max_new_tokens=TOKENS)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(one, prompts[:6]))
    for prompt, answer in zip(prompts, answers, strict=False):
        assert_greedy(hugging_face, prompt, answer["output_ids"])
        assert answer["meta_info"]["spec_num_correct_drafts"] == 0


def test_a_mix_of_plain_and_drafting_requests_gives_hugging_faces_tokens(
    server: Running, prompts: list[list[int]], hugging_face: Any
) -> None:
    def one(numbered: tuple[int, list[int]]) -> list[int]:
        at, prompt = numbered
        headers = {"x-aurora-speculate": "no" if at % 2 else "yes"}
        return server.generate(prompt, headers=headers, max_new_tokens=TOKENS)["output_ids"]

    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(one, enumerate(prompts[:12])))
    for prompt, output in zip(prompts, outputs, strict=False):
        assert_greedy(hugging_face, prompt, output)


@pytest.mark.parametrize("kind", ["chain", "eagle", "wide tree"])
def test_other_draft_shapes_give_hugging_faces_tokens(
    kind: str,
    tmp_path: Path,
    model: Path,
    trained: Path,
    prompts: list[list[int]],
    hugging_face: Any,
    request: pytest.FixtureRequest,
) -> None:
    drafter = request.getfixturevalue("eagle_drafter") if kind == "eagle" else trained
    shape = {"chain": (4, 1, 5), "eagle": (2, 2, 5), "wide tree": (4, 8, 16)}[kind]
    moves = kind != "eagle"  # between depths, from step to step
    environment = {"AURORA_SPECULATION": "auto" if moves else "on", "AURORA_SHAPES": "learned"}
    running = start(tmp_path, model, drafter, shape=shape, environment=environment)
    try:
        some = prompts[:12] if kind == "wide tree" else prompts
        drafts = {"x-aurora-speculate": "yes"}
        assert serve_and_compare(running, some, hugging_face, drafts) > 1.02
        if moves:
            shapes = shapes_served(running)
            ladder = {(one.depth, one.nodes) for one in shapes_within(DraftShape(*shape))}
            assert len(shapes) > 1
            # Trees are grown as far as it pays, chains have a few lengths.
            assert shapes - ladder if kind == "wide tree" else shapes <= ladder
            assert all(depth <= shape[0] and nodes <= shape[2] for depth, nodes in shapes)
        if kind == "wide tree":
            assert_null_runs_cover_zero(running, shape)
        if moves:
            assert_steps_without_drafts_leave_none_behind(running, model)
        if moves:  # whole trees are in test_sampling, on the shared server
            assert_targets_law(
                running, prompts[2], hugging_face, temperature=1.0, top_k=3, top_p=0.95
            )
    finally:
        running.process.stop()


def test_without_speculation_our_cpu_kernels_give_hugging_faces_tokens(
    tmp_path: Path, model: Path, prompts: list[list[int]], hugging_face: Any
) -> None:
    from aurora_sgl.engine.flags import server_flags
    from aurora_sgl.processes.server import ServerProcess, free_port

    flags = ["--dtype", "float32", "--max-total-tokens", "4096", "--max-running-requests", "8"]
    process = ServerProcess(
        server_flags(str(model), None, "", flags, on_cpu=True),
        port=free_port(),
        log=tmp_path / "server.log",
        environment={"AURORA_CPU": "1", "OMP_NUM_THREADS": "1", "AURORA_HOME": str(tmp_path)},
    )
    process.start()
    try:
        process.wait_ready(240)
        plain = Running(process, tmp_path, None, 0, 0)  # type: ignore[arg-type]
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(lambda ids: plain.generate(ids, max_new_tokens=TOKENS), prompts)
            )
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_greedy(hugging_face, prompt, answer["output_ids"])
    finally:
        process.stop()
