"""What is staged lies in shared memory under a name that nobody guesses, and is taken out again."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_sgl import wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.drafter import checkpoint
from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.swap import staging

HELLO = wire.Hello(1, 1, {}, 0, 0, 0, {})


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(staging, "SHARED_MEMORY", memory)
    monkeypatch.setattr(checkpoint, "validate", lambda *_: [])
    torch.manual_seed(0)
    folder = tmp_path / "artifacts" / "one"
    folder.mkdir(parents=True)
    tensors = {"fc.weight": torch.randn(8, 4), "norm.weight": torch.randn(4)}
    save_file(tensors, folder / checkpoint.WEIGHTS)
    wanted = staging.Wanted(3, "one", checkpoint.content_sha256(tensors))

    def stager(name: str = "e") -> staging.Stager:
        artifacts = ArtifactRoot(str(tmp_path / "artifacts"))
        return staging.Stager(artifacts, tmp_path / "home", tmp_path / name)

    return SimpleNamespace(memory=memory, stager=stager, wanted=wanted, tensors=tensors)


def test_only_its_user_reads_what_was_staged_and_no_two_names_are_the_same(house: Any) -> None:
    stager = house.stager()
    one, two = stager.stage(house.wanted, HELLO), stager.stage(house.wanted, HELLO)
    assert one.folder != two.folder and one.folder.parent == house.memory
    assert stat.S_IMODE(one.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(one.path.stat().st_mode) == 0o600
    assert one.size == one.path.stat().st_size
    assert set(load_file(one.path)) == set(house.tensors)
    assert stager.live_sha256(one) == house.wanted.weights_sha256
    stager.discard(one)
    stager.discard(two)
    assert list(house.memory.iterdir()) == []


def test_what_a_killed_sidecar_of_this_endpoint_left_is_gone_at_the_next_start(house: Any) -> None:
    staged = house.stager().stage(house.wanted, HELLO)
    house.stager("another")
    assert staged.path.exists(), "its sidecar lives"
    os.utime(staged.folder, (0, 0))
    house.stager("another")
    assert staged.path.exists(), "its sidecar lives still"
    house.stager()
    assert list(house.memory.iterdir()) == []


def test_without_room_there_is_one_clear_line(house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=5 << 20)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(AuroraError, match="has 5 MB left, and version 3 needs 16 MB") as refusal:
        house.stager().stage(house.wanted, HELLO)
    assert "\n" not in str(refusal.value) and list(house.memory.iterdir()) == []


def test_a_file_that_the_engine_left_cut_short_has_no_hash(house: Any) -> None:
    stager = house.stager()
    staged = stager.stage(house.wanted, HELLO)
    os.truncate(staged.path, staged.size - 8)
    with pytest.raises(AuroraError, match="cut short"):
        stager.live_sha256(staged)
