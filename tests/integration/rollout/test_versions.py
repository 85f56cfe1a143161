"""Drafter folders in and out of the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.drafter import architectures, checkpoint, served
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.target import TargetInfo
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout.versions import export_version, import_version, show_version
from aurora_sgl.store import queries
from tests.support import published

CONFIG = DrafterConfig(
    architecture=EAGLE3,
    hidden_size=16,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=64,
    draft_vocab_size=32,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=128,
    aux_layers=(2, 4, 5),
)
TARGET = TargetInfo("target", 16, 64, 8, "llama", {})


def drafter_folder(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    drafter = architectures.build(CONFIG)
    state = {
        name: torch.randn_like(tensor) if tensor.dtype.is_floating_point else tensor
        for name, tensor in drafter.state_dict().items()
    }
    state["d2t"] = torch.zeros(CONFIG.draft_vocab_size, dtype=torch.int64)
    state["t2d"] = torch.arange(CONFIG.vocab_size) < CONFIG.draft_vocab_size
    drafter.load_state_dict(state)
    return checkpoint.save(drafter, path)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = store.connect(f"sqlite:///{tmp_path / 'aurora.db'}")
    store.upgrade(engine)
    with store.session(engine) as s:
        queries.groups.ensure_group(s, "default", "target", "r1", EAGLE3)
    yield engine
    engine.dispose()


@pytest.fixture
def root(tmp_path: Path) -> ArtifactRoot:
    return ArtifactRoot(str(tmp_path / "artifacts"))


def test_a_folder_becomes_a_version_once(
    engine: Engine, root: ArtifactRoot, tmp_path: Path
) -> None:
    folder = drafter_folder(tmp_path / "drafter")
    version = import_version(engine, root, folder, "default", note="mine", target=TARGET)
    assert import_version(engine, root, folder, version.group_id).id == version.id
    sha256 = checkpoint.content_sha256(checkpoint.read_tensors(folder))
    assert version.weights_sha256 == sha256
    assert version.weights_uri == f"versions/{sha256[:16]}/"
    assert (version.draft_vocab_size, version.target_model) == (32, "target")
    assert (version.target_revision, version.note, version.source) == ("r1", "mine", "import")
    other = import_version(
        engine, root, drafter_folder(tmp_path / "b", seed=1), "default", parent_id=version.id
    )
    details = show_version(engine, root, other.id)
    assert details.lineage == [version.id] and details.has_weights


def test_an_exported_version_is_the_folder_that_came_in(
    engine: Engine, root: ArtifactRoot, tmp_path: Path
) -> None:
    folder = drafter_folder(tmp_path / "drafter")
    version = import_version(engine, root, folder, "default")
    out = export_version(engine, root, version.id, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    with pytest.raises(AuroraError, match="not empty"):
        export_version(engine, root, version.id, out)
    export_version(engine, root, version.id, out, force=True)
    assert [p.name for p in tmp_path.glob(".*")] == []


def broken(kind: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif kind == "not finite":
        tensors = load_file(weights)
        tensors["lm_head.weight"][0, 0] = float("nan")
        save_file(tensors, weights)
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "other architecture":
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["LlamaForSequenceClassification"]
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["truncated", "not finite", "no config", "other architecture"])
def test_a_broken_folder_is_refused_and_leaves_nothing(
    engine: Engine, root: ArtifactRoot, tmp_path: Path, kind: str
) -> None:
    folder = drafter_folder(tmp_path / "drafter")
    broken(kind, folder)
    with pytest.raises(AuroraError) as caught:
        import_version(engine, root, folder, "default")
    assert "\n" not in str(caught.value)
    with store.session(engine, write=False) as s:
        assert queries.versions.versions(s, 1) == []
    assert not (tmp_path / "artifacts").exists()


def test_a_drafter_for_another_target_is_refused(
    engine: Engine, root: ArtifactRoot, tmp_path: Path
) -> None:
    other = TargetInfo("big", 4096, 128_000, 32, "llama", {})
    with pytest.raises(AuroraError, match="4096"):
        import_version(engine, root, drafter_folder(tmp_path / "d"), "default", target=other)


def test_weights_that_were_changed_in_place_are_not_exported(
    engine: Engine, root: ArtifactRoot, tmp_path: Path
) -> None:
    version = import_version(engine, root, drafter_folder(tmp_path / "a"), "default")
    changed = drafter_folder(tmp_path / "b", seed=1) / "model.safetensors"
    root.put_file(changed, f"{version.weights_uri}model.safetensors")
    with pytest.raises(AuroraError, match="changed or damaged"):
        export_version(engine, root, version.id, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_importing_again_restores_pruned_weights(
    engine: Engine, root: ArtifactRoot, tmp_path: Path
) -> None:
    folder = drafter_folder(tmp_path / "a")
    version = import_version(engine, root, folder, "default")
    with store.session(engine) as s:
        queries.versions.set_pruned(s, version.id)
    root.delete(version.weights_uri)
    with pytest.raises(AuroraError, match="deleted"):
        export_version(engine, root, version.id, tmp_path / "out")
    again = import_version(engine, root, folder, "default")
    assert (again.id, again.pruned_at) == (version.id, None)
    export_version(engine, root, version.id, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "form"),
    [*((make, "one") for make in published.MAKERS), (published.eagle3_of_specforge, "shards")],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_a_published_folder_becomes_a_version_that_any_sglang_serves(
    engine: Engine, tmp_path: Path, make: published.Maker, form: str
) -> None:
    folder = make(tmp_path / "published", form)
    artifacts = ArtifactRoot(str(tmp_path / "files"))
    architecture = architectures.read_config(folder).architecture
    with store.session(engine) as s:
        queries.groups.ensure_group(s, "theirs", "target", "r1", architecture)
    version = import_version(engine, artifacts, folder, "theirs")
    assert version.architecture == architecture
    again = import_version(engine, artifacts, folder, "theirs")
    assert again.id == version.id, "the same weights are the same version"
    into = export_version(engine, artifacts, version.id, tmp_path / "out")
    assert served.is_as_served(into, architectures.read_config(into))
    assert sorted(path.name for path in into.iterdir()) == ["config.json", checkpoint.WEIGHTS]
    from_copy = served.folder_for(folder, architectures.read_config(folder), 512, tmp_path / "home")
    assert import_version(engine, artifacts, from_copy, "theirs").id == version.id
    child = checkpoint.save(checkpoint.load(into), tmp_path / "child", dtype=torch.float32)
    assert import_version(engine, artifacts, child, "theirs", parent_id=version.id).id > version.id
    assert checkpoint.vocab_sha256(checkpoint.read_tensors(child)) == version.vocab_sha256
