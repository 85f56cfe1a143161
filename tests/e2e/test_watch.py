"""A drafter that should never have gone live, on a real server with real traffic."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import WatchSettings
from aurora_sgl.rollout import status, watch
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.store import queries
from tests.e2e.conftest import Running, until
from tests.e2e.test_identity import assert_greedy
from tests.e2e.test_swap import artifacts, flush

#: Requests of the version before that the watch may compare with.
BASELINE = 6


def shuffled(folder: Path, into: Path) -> Path:
    """The drafter with the weights of its layer, and of what feeds it, shuffled."""
    shutil.copytree(folder, into)
    tensors = load_file(into / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "mlp" in name or "self_attn" in name or name.startswith("fc."):
            order = torch.randperm(tensor.numel(), generator=generator)
            tensors[name] = tensor.flatten()[order].reshape(tensor.shape).contiguous()
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    return into


def command(server: Running, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "aurora_sgl.cli", *arguments, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "AURORA_HOME": str(server.home)},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


class Traffic(threading.Thread):
    """Requests one after another until it is told to end."""

    def __init__(self, server: Running, prompts: list[list[int]]) -> None:
        super().__init__(daemon=True)
        self.server, self.prompts, self.ending = server, prompts, threading.Event()

    def run(self) -> None:
        at = 0
        while not self.ending.is_set():
            self.server.generate(self.prompts[at % len(self.prompts)], max_new_tokens=24)
            at += 1


def test_a_damaged_drafter_put_live_by_hand_is_rolled_back_by_the_watch(
    server: Running, trained: Path, prompts: list[list[int]], hugging_face: Any, tmp_path: Path
) -> None:
    before = server.live_version()
    flush(server)  # draft KV of other tests' drafters is no baseline
    begun = utc_now()
    for prompt in prompts[:BASELINE]:  # what the watch compares with
        server.generate(prompt, max_new_tokens=24)
    bad = import_version(
        server.engine, artifacts(server), shuffled(trained, tmp_path / "bad"), server.group_id
    ).id
    change = command(server, "promote", str(bad), "--force", "--reason", "a slip of the hand")
    assert change["version_id"] == bad and change["previous_version_id"] == before
    with store.session(server.engine, write=False) as s:
        back = queries.watches.watches(s, server.group_id, limit=1)[0].started_at - begun
    hours = back.total_seconds() / 3600  # nothing that other tests served
    rules = WatchSettings(steps=150, requests=10, seconds=180, look_back_hours=hours)
    until(lambda: server.live_version() == bad, 30, "the damaged version to be live")
    traffic = [Traffic(server, prompts[part::4]) for part in range(4)]
    for thread in traffic:
        thread.start()

    def ended() -> bool:
        time.sleep(0.5)
        return watch.tick(server.engine, server.group_id, settings=rules) is None

    until(ended, 120, "the watch to end")
    for thread in traffic:
        thread.ending.set()
    until(lambda: server.live_version() == before, 90, "the rollback")
    for thread in traffic:
        thread.join()
    with store.session(server.engine, write=False) as s:
        (found,) = queries.watches.watches(s, server.group_id, limit=1)
        windows = queries.watches.watch_windows(s, found.id)
        (window,) = windows  # one was enough
        last = queries.deployments.deployments(s, server.group_id, limit=1)[0]
        name = queries.groups.group(s, server.group_id).name
    assert (found.status, found.version_id) == ("failed", bad)
    assert found.baseline["requests"] == BASELINE and window.verdict == "fail"
    assert window.accept_length < 1.2 < window.expected_accept_length
    assert (last.action, last.actor, last.version_id) == ("rollback", "watch", before)
    (row,) = status.servers(server.engine, name)
    assert row.converged and row.live_version_id == before
    answer = server.generate(prompts[7], max_new_tokens=12)
    assert_greedy(hugging_face, prompts[7], answer["output_ids"])
