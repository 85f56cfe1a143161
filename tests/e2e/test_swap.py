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
import psutil
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


def go_live(server: Running, version_id: int, seconds: float = 30) -> None:
    promote(server.engine, version_id, actor="test", reason="a test")
    until(lambda: server.live_version() == version_id, seconds, f"version {version_id} to be live")


def flush(server: Running) -> None:
    """Empty the prefix cache; SGLang refuses while a request runs."""
    until(
        lambda: httpx.post(f"{server.url}/flush_cache", timeout=30).status_code == 200,
        30,
        "an empty prefix cache",
    )


def test_a_swap_in_mid_request_changes_no_token_and_the_server_reports_what_is_live(
    server: Running, trained: Path, prompts: list[list[int]], hugging_face: Any, tmp_path: Path
) -> None:
    before = server.live_version()
    assert before is not None
    target = target_checksum(server.url)
    flush(server)
    other = a_relative(server, trained, tmp_path / "other", 0.97)
    answers: dict[str, list[int]] = {}

    def long_requests() -> None:
        """One after another until the swap is known: on a busy machine a version takes longer to be
        staged than one request lasts."""
        body = {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}
        while server.live_version() == before:
            rid = uuid.uuid4().hex
            asked = {"input_ids": prompts[0], "rid": rid, "sampling_params": body}
            answer = httpx.post(f"{server.url}/generate", json=asked, timeout=300).json()
            answers[rid] = answer["output_ids"]

    thread = threading.Thread(target=long_requests)
    thread.start()
    time.sleep(0.5)  # far less than a version takes to be staged: some steps come before it
    go_live(server, other, seconds=120)
    thread.join()
    assert target_checksum(server.url) == target
    with store.session(server.engine, write=False) as s:
        wanted = queries.versions.version(s, other).weights_sha256
    until(lambda: server.row().live_sha256 == wanted, 30, "the hash of what was read back")
    met = {}
    for rid in answers:
        steps = server.events(server.request(rid).id)
        if len({step["drafter_version_id"] for step in steps}) > 1:
            met[rid] = steps
    ((rid, steps),) = met.items()
    assert_greedy(hugging_face, prompts[0], answers[rid])
    versions = [step["drafter_version_id"] for step in steps]
    assert versions == sorted(versions, key=[before, other].index)
    assert set(versions) == {before, other}
    first = versions.index(other)
    assert steps[first]["swap_age"] == 0 or steps[first]["swap_age"] < steps[first - 1]["swap_age"]
    assert not any(step["mixed"] for step in steps[:first])
    assert all(step["mixed"] for step in steps[first:])
    _, _, after = serve(server, prompts[0], max_new_tokens=8)
    assert {step["drafter_version_id"] for step in after} == {other}
    assert all(step["mixed"] for step in after)  # its prompt was cached before the swap
    _, row, fresh = serve(server, [*prompts[0][26:], *prompts[1][26:]], max_new_tokens=8)
    assert row.cached_tokens == 0 and not any(step["mixed"] for step in fresh)
    rollback(server.engine, server_group(server), actor="test", reason="back to where it was")
    until(lambda: server.live_version() == before, 30, "the rollback")


def server_group(server: Running) -> str:
    with store.session(server.engine, write=False) as s:
        return queries.groups.group(s, server.group_id).name


def is_mixed(steps: list[dict[str, Any]]) -> bool:
    """Whether a request's steps are mixed; all of them are alike."""
    (mixed,) = {bool(step["mixed"]) for step in steps}
    return mixed


def test_a_promotion_and_a_rollback_leave_every_cached_prefix_usable(
    server: Running, trained: Path, prompts: list[list[int]], hugging_face: Any, tmp_path: Path
) -> None:
    """A prompt of some hundred tokens, in several chunks."""
    before = server.live_version()
    other = a_relative(server, trained, tmp_path / "other", 0.96)
    long = [token for prompt in prompts[:8] for token in prompt][:260]
    new = [token for prompt in prompts[8:14] for token in prompt[26:]]
    flush(server)

    def ask(ids: list[int]) -> tuple[list[int], int, bool]:
        answer, row, steps = serve(server, ids, max_new_tokens=12, ignore_eos=True)
        assert answer["meta_info"]["cached_tokens"] == row.cached_tokens
        assert {step["depth"] for step in steps} == {3}
        return answer["output_ids"], row.cached_tokens, is_mixed(steps)

    tokens, cached, mixed = ask(long)
    assert (cached, mixed) == (0, False)
    assert_greedy(hugging_face, long, tokens)
    _, cached, _ = ask(long)
    assert cached >= len(long) - 2
    assert ask(long) == (tokens, cached, False)
    go_live(server, other)
    try:
        assert ask(long) == (tokens, cached, True)  # draft KV of the version before
        tokens_of_new, nothing, mixed = ask(new)
        assert (nothing, mixed) == (0, False)
    finally:
        rollback(server.engine, server_group(server), actor="test", reason="undo")
        until(lambda: server.live_version() == before, 30, "the rollback")
    assert ask(long) == (tokens, cached, False)  # made by the version that is back
    again, cached, mixed = ask(new)
    assert again == tokens_of_new and cached >= len(new) - 2 and mixed


@pytest.mark.parametrize("shared", [26, 150])
def test_a_head_that_many_requests_share_gets_the_new_drafters_kv_once(
    shared: int,
    server: Running,
    trained: Path,
    prompts: list[list[int]],
    hugging_face: Any,
    tmp_path: Path,
) -> None:
    """Otherwise no request behind a system prompt would ever tell about a new version."""
    before = server.live_version()
    head = [token for prompt in prompts for token in prompt][:shared]
    asked = [head + prompt[26:] for prompt in prompts[:6]]
    flush(server)
    serve(server, asked[0], max_new_tokens=4)
    go_live(server, a_relative(server, trained, tmp_path / "other", 1.0 + shared / 10_000))
    try:
        found = []
        for ids in asked[1:]:
            answer, row, steps = serve(server, ids, max_new_tokens=6, ignore_eos=True)
            found.append((row.cached_tokens >= shared - 8, is_mixed(steps)))
        # The first one meets it, the next one computes it again, all others find it renewed.
        assert found == [(True, True), (False, False), *3 * [(True, False)]]
        assert_greedy(hugging_face, asked[-1], answer["output_ids"])
    finally:
        rollback(server.engine, server_group(server), actor="test", reason="undo")
        until(lambda: server.live_version() == before, 30, "the rollback")


def test_what_a_request_without_drafts_leaves_in_the_cache_is_used_and_told(
    server: Running, prompts: list[list[int]], hugging_face: Any
) -> None:
    flush(server)
    for wish in ("no", "yes"):
        headers, prompt = {"x-aurora-speculate": wish}, prompts[14 + len(wish)]
        sampling = {"max_new_tokens": 16, "ignore_eos": True}
        answer, _, steps = serve(server, prompt, headers, **sampling)
        assert {step["depth"] for step in steps} == ({0} if wish == "no" else {3})
        turn = [*prompt, *answer["output_ids"], *prompts[18][26:]]
        answer, row, steps = serve(server, turn, {"x-aurora-speculate": "yes"}, **sampling)
        assert row.cached_tokens >= len(prompt) + 14
        assert {step["depth"] for step in steps} == {3}
        assert is_mixed(steps) == (wish == "no")  # the plain answer has no draft KV
        assert_greedy(hugging_face, turn, answer["output_ids"])


def test_a_clients_cache_key_keeps_its_meaning_and_decides_nothing_else(
    server: Running, prompts: list[list[int]]
) -> None:
    def ask(key: str) -> tuple[int, set[int], bool]:
        rid = uuid.uuid4().hex
        body = {
            "input_ids": prompts[19],
            "rid": rid,
            "extra_key": key,
            "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        }
        headers = {"x-aurora-speculate": "no", "x-aurora-train": "no"}
        httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=60)
        row = server.request(rid)
        return row.cached_tokens, {s["depth"] for s in server.events(row.id)}, row.traced

    flush(server)
    for key in ("mine:drafts", "mine:traced", "aurora:0:drafts:traced", "mine|aurora:traced"):
        assert ask(key) == (0, {0}, False)
        assert ask(key)[0] >= len(prompts[19]) - 2


def test_the_weights_that_are_read_back_are_those_of_the_version(server: Running) -> None:
    row = server.row()
    with store.session(server.engine, write=False) as s:
        version = queries.versions.version(s, row.live_version_id)
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
            uri = queries.versions.version(s, version_id).weights_uri
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
            assert row.live_sha256 == queries.versions.version(s, version_id).weights_sha256
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
    return [process for process in server.process.family() if is_sidecar(process)]


def is_sidecar(process: Any) -> bool:
    try:
        return "aurora_sgl.sidecar" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # ended, and perhaps not waited for yet
        return False
