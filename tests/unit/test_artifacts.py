"""The artifact root, as a local folder and as something remote (fsspec's in-memory files)."""

from __future__ import annotations

import errno
import uuid
from pathlib import Path
from typing import Any

import pytest

from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_bytes


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactRoot:
    if request.param == "local":
        return ArtifactRoot(str(tmp_path / "artifacts"))
    return ArtifactRoot(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "drafter"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"w" * 3_000_000)
    return made


def everything(root: ArtifactRoot) -> list[str]:
    return sorted(str(name) for name in root._fs.find(root._path))


def test_a_file_comes_back_as_it_went(root: ArtifactRoot, folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    uri = "traces/20261124/7.safetensors"
    assert not root.exists(uri)
    assert root.put_file(folder / "model.safetensors", uri) == sha256_bytes(data)
    assert root.exists(uri) and root.size(uri) == len(data)
    with root.open(uri) as file:
        assert file.read() == data
    assert len(everything(root)) == 1  # nothing is left beside it


def test_a_folder_comes_back_whole(root: ArtifactRoot, folder: Path, tmp_path: Path) -> None:
    hashes = root.put_folder(folder, "versions/abc/")
    assert list(hashes) == ["model.safetensors", "config.json"]
    assert root.exists("versions/abc/")
    into = root.fetch_folder("versions/abc/", tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in into.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    assert len(everything(root)) == 2


def test_the_same_folder_again_is_left_and_another_one_replaces_it(
    root: ArtifactRoot, folder: Path, tmp_path: Path
) -> None:
    root.put_folder(folder, "versions/abc/")
    root.put_folder(folder, "versions/abc/")
    (folder / "config.json").write_text('{"new": 1}')
    root.put_folder(folder, "versions/abc/")
    into = root.fetch_folder("versions/abc/", tmp_path / "copy")
    assert (into / "config.json").read_text() == '{"new": 1}'
    assert len(everything(root)) == 2


def test_deleting_what_is_not_there_is_fine(root: ArtifactRoot, folder: Path) -> None:
    root.put_folder(folder, "versions/abc/")
    root.delete("versions/abc/")
    root.delete("versions/abc/")
    assert not root.exists("versions/abc/") and everything(root) == []


@pytest.mark.parametrize("uri", ["../secrets", "/etc/passwd", "a/../../b", ""])
def test_a_uri_can_not_leave_the_root(root: ArtifactRoot, uri: str) -> None:
    with pytest.raises(AuroraError, match="not a path inside"):
        root.exists(uri)
    with pytest.raises(AuroraError, match="not a path inside"):
        root.delete(uri)


def test_a_missing_artifact_is_one_line(root: ArtifactRoot, tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="can't fetch versions/none/"):
        root.fetch_folder("versions/none/", tmp_path / "copy")
    with pytest.raises(AuroraError, match="can't read traces/none"):
        root.open("traces/none")
    assert list(tmp_path.glob("*copy*")) == []


def test_a_full_disk_is_said_and_leaves_what_was_there(
    root: ArtifactRoot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.put_folder(folder, "versions/abc/")
    before = everything(root)

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(root._fs, "size", full)
    (folder / "config.json").write_text('{"new": 1}')
    with pytest.raises(AuroraError, match="no space left"):
        root.put_file(folder / "config.json", "versions/abc/config.json")
    with pytest.raises(AuroraError, match="no space left"):
        root.put_folder(folder, "versions/new/")
    assert everything(root) == before


def test_only_a_local_root_has_paths(tmp_path: Path) -> None:
    assert ArtifactRoot("memory://x").local_path("a/b") is None
    local = ArtifactRoot(f"file://{tmp_path}")
    assert local.local_path("a/b/") == tmp_path / "a" / "b"


def test_a_url_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(AuroraError, match="AURORA_ARTIFACTS"):
        ArtifactRoot("nosuch://bucket")
