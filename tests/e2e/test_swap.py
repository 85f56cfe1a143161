"""A new drafter in the running server: between two steps, without a trace in the output."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.refresh import refresh
from aurora_sgl.rollout.promote import promote, rollback
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.store import queries
from benchmarks.swaps import target_checksum
from tests.e2e.conftest import Running, until
from tests.e2e.test_identity import assert_greedy
from tests.e2e.test_records import serve


def artifacts(server: Running) -> ArtifactRoot:
    return ArtifactRoot(str(server.home / "artifacts"))


def a_relative(server: Running, folder: Path, into: Path, scale: float, name: str = "") -> int:
    """A version whose matrices differ from a folder's by a factor: all of them, or those whose
    names hold ``name``."""
    shutil.copytree(folder, into)
    tensors = load_file(into / "model.safetensors")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dim() > 1 and name in key:
            tensors[key] = (tensor.float() * scale).to(tensor.dtype)
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    return import_version(server.engine, artifacts(server), into, server.group_id).id


def go_live(server: Running, version_id: int, reason: str = "a test", **kw: Any) -> None:
    promote(server.engine, version_id, actor="test", reason=reason, **kw)
    until(lambda: server.live_version() == version_id, 30, f"version {version_id} to be live")


def test_a_swap_in_mid_request_changes_no_token_and_the_server_reports_what_is_live(
    server: Running, trained: Path, prompts: list[list[int]], hugging_face: Any, tmp_path: Path
) -> None:
    before = server.live_version()
    assert before is not None
    target = target_checksum(server.url)
    other = a_relative(server, trained, tmp_path / "other", 0.97)
    rid, body = uuid.uuid4().hex, {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}
    answer: dict[str, Any] = {}

    def long_request() -> None:
        asked = {"input_ids": prompts[0], "rid": rid, "sampling_params": body}
        answer.update(httpx.post(f"{server.url}/generate", json=asked, timeout=300).json())

    thread = threading.Thread(target=long_request)
    thread.start()
    time.sleep(2.0)
    go_live(server, other)
    thread.join()
    assert target_checksum(server.url) == target
    assert_greedy(hugging_face, prompts[0], answer["output_ids"])
    with store.session(server.engine, write=False) as s:
        assert (
            queries.server(s, server.server_id).live_sha256
            == queries.version(s, other).weights_sha256
        )
    row = server.request(rid)
    steps = server.events(row.id)
    versions = [step["drafter_version_id"] for step in steps]
    assert versions == sorted(versions, key=[before, other].index)
    assert set(versions) == {before, other}
    first = versions.index(other)
    assert steps[first]["swap_age"] == 0 or steps[first]["swap_age"] < steps[first - 1]["swap_age"]
    assert not any(step["mixed"] for step in steps[:first])
    assert all(step["mixed"] for step in steps[first:])
    _, _, after = serve(server, prompts[0], max_new_tokens=8)
    assert {step["drafter_version_id"] for step in after} == {other}
    assert not any(step["mixed"] for step in after)  # prefilled after the swap, its own cache
    rollback(server.engine, server_group(server), actor="test", reason="back to where it was")
    until(lambda: server.live_version() == before, 30, "the rollback")


def server_group(server: Running) -> str:
    with store.session(server.engine, write=False) as s:
        return queries.group(s, server.group_id).name


def test_the_weights_that_are_read_back_are_those_of_the_version(server: Running) -> None:
    row = server.row()
    with store.session(server.engine, write=False) as s:
        version = queries.version(s, row.live_version_id)
    folder = artifacts(server).local_path(version.weights_uri)
    assert row.live_sha256 == version.weights_sha256
    assert checkpoint.content_sha256(checkpoint.read_tensors(folder)) == row.live_sha256


@pytest.mark.parametrize("damage", ["fewer draft tokens", "changed on disk", "truncated"])
def test_weights_that_do_not_fit_are_refused_with_a_reason_and_serving_goes_on(
    damage: str,
    server: Running,
    trained: Path,
    prompts: list[list[int]],
    hugging_face: Any,
    tmp_path: Path,
) -> None:
    before = server.live_version()
    folder = tmp_path / "bad"
    shutil.copytree(trained, folder)
    if damage == "fewer draft tokens":
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["draft_vocab_size"] -= 1
        (folder / "config.json").write_text(json.dumps(config))
        size = config["draft_vocab_size"]
        tensors["t2d"][int(tensors["d2t"][size]) + size] = False
        tensors["d2t"] = tensors["d2t"][:size].clone()
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:size].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        version_id = import_version(server.engine, artifacts(server), folder, server.group_id).id
    else:
        version_id = a_relative(server, trained, tmp_path / damage, 0.9 + len(damage) / 1000)
        with store.session(server.engine, write=False) as s:
            uri = queries.version(s, version_id).weights_uri
        stored = artifacts(server).local_path(uri) / "model.safetensors"
        data = bytearray(stored.read_bytes())
        stored.unlink()
        data[-1] ^= 1
        stored.write_bytes(bytes(data if damage == "changed on disk" else data[:-100]))
    promote(server.engine, version_id, actor="test", reason=damage)
    try:
        words = {"fewer draft tokens": "has draft_vocab_size"}.get(damage, "")
        until(lambda: server.row().last_error, 30, "a refusal")
        assert words in server.row().last_error
        assert server.live_version() == before
        answer = server.generate(prompts[5], max_new_tokens=12)
        assert_greedy(hugging_face, prompts[5], answer["output_ids"])
    finally:
        rollback(server.engine, server_group(server), actor="test", reason="undo")
        until(lambda: not server.row().last_error, 30, "the error to be gone")


def test_a_version_with_a_refreshed_draft_vocabulary_goes_live_in_place(
    server: Running, trained: Path, prompts: list[list[int]], hugging_face: Any, tmp_path: Path
) -> None:
    drafter = checkpoint.load(trained)
    seen = [server.generate(p, max_new_tokens=24)["output_ids"] for p in prompts[:3]]
    wanted = set(range(drafter.config.vocab_size)) - set(drafter.target_ids.tolist())
    counts = Counter(sorted(wanted)[:40]) + Counter(token for ids in seen for token in ids)
    fresh = refresh(drafter, counts, always=[t for ids in seen for t in ids])
    assert fresh.replaced >= 40 and fresh.coverage > fresh.coverage_before
    # What moved in ``d2t`` would ruin every draft if the server went on with the old one.
    assert (fresh.drafter.target_ids != drafter.target_ids).sum() > 100
    dtype = load_file(trained / "model.safetensors")["lm_head.weight"].dtype
    folder = checkpoint.save(fresh.drafter.to(dtype), tmp_path / "fresh")
    version_id = import_version(server.engine, artifacts(server), folder, server.group_id).id
    old = [serve(server, p, max_new_tokens=24)[1].accepted for p in prompts[:3]]
    go_live(server, version_id)
    try:
        served = [serve(server, p, max_new_tokens=24) for p in prompts[:3]]
        # A new row, still untrained, may win here and there.
        assert sum(row.accepted for _, row, _ in served) >= 0.8 * sum(old) > 3
        for prompt, (answer, _, steps) in zip(prompts, served, strict=False):
            assert_greedy(hugging_face, prompt, answer["output_ids"])
            assert {step["drafter_version_id"] for step in steps} == {version_id}
        row = server.row()
        with store.session(server.engine, write=False) as s:
            assert row.live_sha256 == queries.version(s, version_id).weights_sha256
    finally:
        rollback(server.engine, server_group(server), actor="test", reason="undo")
        until(lambda: server.live_version() != version_id, 30, "the rollback")


def test_a_sidecar_that_is_killed_comes_back_and_recording_goes_on(
    server: Running, prompts: list[list[int]]
) -> None:
    before = {p.pid for p in sidecars(server)}
    assert before
    for process in sidecars(server):
        process.send_signal(signal.SIGKILL)
    server.generate(prompts[3], max_new_tokens=8)  # while it is away
    until(lambda: {p.pid for p in sidecars(server)} - before, 30, "a new sidecar")
    _, row, steps = serve(server, prompts[4], max_new_tokens=8)
    assert row.status == "finished" and len(steps) == row.verify_steps


def sidecars(server: Running) -> list[Any]:
    return [
        process
        for process in server.process.family()
        if "aurora_sgl.sidecar" in " ".join(process.cmdline())
    ]
