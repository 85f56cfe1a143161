"""The start-up matrix behind the engine: what a sidecar stores, and says, of servers whose drafter
or folders it can't use."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import Settings
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.errors import Unusable
from aurora_sgl.health import HealthServer
from aurora_sgl.rollout import status, versions
from aurora_sgl.sidecar import reconcile
from aurora_sgl.sidecar.service import SidecarService
from aurora_sgl.sidecar.supervisor import SidecarSupervisor
from tests.support import store_samples as samples
from tests.support.sidecar_engine import Engine, Sidecar, end_all, wait_until

BOOT = 4242
TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("target")
    (target / "config.json").write_text(json.dumps(TARGET))
    fresh = scratch.make(target, counts={n: 96 - n for n in range(96)}, draft_vocab_size=48)
    return checkpoint.save(fresh, target / "drafter")


@pytest.fixture
def folder(tmp_path: Path, drafter: Path) -> Path:
    return shutil.copytree(drafter, tmp_path / "drafter")


@pytest.fixture
def running() -> Iterator[list[Sidecar | Engine]]:
    """What a test starts; stopped after it."""
    both: list[Sidecar | Engine] = []
    yield both
    end_all(both)


class House:
    """A sidecar, a server that served one request of three steps, and their store."""

    def __init__(
        self, base: Path, running: list[Sidecar | Engine], server: dict[str, Any], **settings: Any
    ) -> None:
        base.mkdir(parents=True, exist_ok=True)
        home = base / "home"
        self.url = str(settings.get("database_url") or f"sqlite:///{home / 'aurora.db'}")
        self.sidecar = Sidecar(home, base / "e", **settings)
        running.append(self.sidecar)
        self._serve(base / "e", running, server)

    @classmethod
    def beside(
        cls,
        endpoint: Path,
        running: list[Sidecar | Engine],
        settings: Settings,
        server: dict[str, Any],
    ) -> House:
        """With a sidecar that runs already."""
        house = cls.__new__(cls)
        house.url = settings.store_url
        house._serve(endpoint, running, server)
        return house

    def _serve(
        self, endpoint: Path, running: list[Sidecar | Engine], server: dict[str, Any]
    ) -> None:
        self.engine = Engine(endpoint, BOOT, **server)
        running.append(self.engine)
        self.engine.run()
        self.engine.send(samples.started(1, boot_id=BOOT))
        steps = [samples.chain_step(1, i, i % 4, boot_id=BOOT) for i in range(3)]
        for step in steps:
            self.engine.send(step)
        self.engine.send(samples.finished(1, steps, boot_id=BOOT))

    def ask(self, statement: str) -> Any:
        """One value; None while there is no such row, or no store yet."""
        from sqlalchemy import text

        try:
            engine = store.connect(self.url)
        except Exception:
            return None
        try:
            with store.reading(engine) as connection:
                return connection.scalar(text(statement))
        except Exception:
            return None
        finally:
            engine.dispose()

    def wait_stored(self) -> None:
        wait_until(lambda: self.ask("SELECT count(*) FROM acceptance_event") == 3, 30, "3 events")

    def status(self) -> status.ServerStatus:
        engine = store.connect(self.url)
        try:
            return status.servers(engine, "default")[0]
        finally:
            engine.dispose()

    def notice(self, words: str) -> str:
        """The sentence with these words that ``status`` and the Now page show."""

        def search() -> str:
            return next((one for one in self.status().notices if words in one), "")

        return str(wait_until(search, 20, words))


def change(folder: Path, **fields: Any) -> None:
    place = folder / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **fields}))


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_parts(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()


def more_layers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    first = {name: t for name, t in tensors.items() if name.startswith("midlayer.")}
    second = {name.replace("midlayer.", "layers.1."): t.clone() for name, t in first.items()}
    save_file({**tensors, **second}, folder / "model.safetensors")
    change(folder, num_hidden_layers=2)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def with_code(folder: Path) -> None:
    torch.save({"fc.weight": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [in_parts], ids=lambda one: one.__name__)
def test_weights_in_another_form_become_a_version_with_the_same_hash(
    tmp_path: Path,
    folder: Path,
    drafter: Path,
    running: list[Sidecar | Engine],
    damage: Callable[[Path], None],
) -> None:
    damage(folder)
    house = House(tmp_path / "h", running, {"drafter_path": str(folder)})
    house.wait_stored()
    sha256 = checkpoint.content_sha256(checkpoint.read_tensors(drafter))
    assert house.ask("SELECT weights_sha256 FROM drafter_version") == sha256
    (stored,) = (tmp_path / "h" / "home" / "artifacts" / "versions").iterdir()
    assert checkpoint.validate(stored) == [] and (stored / "model.safetensors").exists()
    assert house.ask("SELECT boot_version_id FROM server") == 1


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (more_layers, "only drafters of one layer are supported"),
        (
            lambda folder: change(folder, architectures=["DeepseekV3ForCausalLMNextN"]),
            "not a drafter: architecture DeepseekV3ForCausalLMNextN",
        ),
        (lambda folder: change(folder, norm_before_fc=True), "norm_before_fc"),
        (lambda folder: change(folder, num_attention_heads=None), "lacks 'num_attention_heads'"),
        (as_pickle, "aurora-sgl versions convert"),
        (with_code, "aurora-sgl versions convert"),
        (shutil.rmtree, "no config.json"),
    ],
    ids=["layers", "architecture", "norm_before_fc", "odd", "pickle", "code", "gone"],
)
def test_what_cannot_become_a_version_is_told_from_what_may_go_well_another_time(
    tmp_path: Path, folder: Path, damage: Callable[[Path], None], why: str
) -> None:
    damage(folder)
    engine = store.connect(f"sqlite:///{tmp_path / 'store.db'}")
    try:
        with pytest.raises(Unusable, match=re.escape(why)) as refused:
            versions.import_version(engine, ArtifactRoot(str(tmp_path)), folder, "default")
    finally:
        engine.dispose()
    assert "\n" not in str(refused.value)


def test_a_drafter_that_cannot_become_a_version_is_unknown_and_its_requests_are_recorded(
    tmp_path: Path, folder: Path, running: list[Sidecar | Engine]
) -> None:
    more_layers(folder)
    house = House(tmp_path / "h", running, {"drafter_path": str(folder)})
    house.wait_stored()
    notice = house.notice("The drafter of this server is unknown")
    assert "only drafters of one layer" in notice and "\n" not in notice
    assert notice.endswith("recorded without a version, and no version goes live here.")
    assert house.ask("SELECT count(*) FROM drafter_version") == 0
    wait_until(lambda: house.sidecar.get("/health")[0] == 200, 20, "ready")
    assert "only drafters of one layer" in house.sidecar.get("/health")[1]


def test_a_drafter_that_the_engine_cannot_tell_is_unknown_though_its_folder_is_good(
    tmp_path: Path, folder: Path, running: list[Sidecar | Engine]
) -> None:
    server = {"drafter_path": str(folder), "unknown_drafter": "its weights are quantised"}
    house = House(tmp_path / "h", running, server)
    house.wait_stored()
    assert "unknown: its weights are quantised." in house.notice("The drafter of this server")
    assert house.ask("SELECT count(*) FROM drafter_version") == 0


def test_a_boot_drafter_that_was_given_by_its_name_on_the_hub_is_imported_from_the_cache(
    tmp_path: Path,
    drafter: Path,
    running: list[Sidecar | Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    into_cache(tmp_path / "hub", "org/drafter", drafter)
    house = House(tmp_path / "h", running, {"drafter_path": "org/drafter"})
    house.wait_stored()
    sha256 = checkpoint.content_sha256(checkpoint.read_tensors(drafter))
    assert house.ask("SELECT weights_sha256 FROM drafter_version") == sha256


def into_cache(cache: Path, name: str, source: Path) -> None:
    """As huggingface_hub lays it out: blobs, and links to them by revision."""
    commit = "0" * 40
    base = cache / f"models--{name.replace('/', '--')}"
    snapshot = base / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(commit)
    (base / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, base / "blobs" / str(number))
        (snapshot / file.name).symlink_to(base / "blobs" / str(number))


def test_a_health_port_that_is_taken_costs_the_endpoint_alone(
    tmp_path: Path, running: list[Sidecar | Engine]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        house = House(tmp_path / "h", running, {}, health_port=port)
        house.wait_stored()
        notice = house.notice("There is no health endpoint")
    assert f"port {port}: Address already in use; choose another" in notice


def test_with_a_database_elsewhere_records_are_stored_without_an_artifact_root(
    tmp_path: Path,
    folder: Path,
    running: list[Sidecar | Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconcile, "IDENTIFY_PATIENCE", 0.0)
    (tmp_path / "file").write_text("")
    settings = Settings(
        home=tmp_path / "home",
        database_url=f"sqlite:///{tmp_path / 'elsewhere.db'}",
        artifacts=str(tmp_path / "file" / "artifacts"),
        capture_share=0.0,
    )
    service = SidecarService(settings, tmp_path / "e")
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        house = House.beside(tmp_path / "e", running, settings, {"drafter_path": str(folder)})
        house.wait_stored()
        assert "can't be imported" in house.notice("The drafter of this server is unknown")
    finally:
        service.ending.ask()
        thread.join(30)


def test_a_store_that_is_not_understood_leaves_records_in_the_spool(
    tmp_path: Path, running: list[Sidecar | Engine]
) -> None:
    house = House(tmp_path / "h", running, {}, database_url="nonsense")
    house.sidecar.wait_ready()
    wait_until(lambda: house.sidecar.get("/health")[0] == 503, 20, "the reason")
    wait_until(lambda: "the store is away, records wait in the spool" in house.sidecar.text(), 20)
    spool = tmp_path / "h" / "home" / "spool" / "0"
    wait_until(lambda: sum(one.stat().st_size for one in spool.glob("*.spool")) > 500, 20)


def test_a_sidecar_that_cannot_start_says_why_in_the_servers_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(home=tmp_path / "home", artifacts="nothing://bucket")
    supervisor = SidecarSupervisor(settings, tmp_path / "e")
    with caplog.at_level(logging.WARNING):
        supervisor.start()
        try:
            wait_until(lambda: caplog.records, 30, "a line")
        finally:
            supervisor.stop()
    line = caplog.records[0].getMessage()
    assert "AURORA_ARTIFACTS 'nothing://bucket' can't be used" in line and "\n" not in line
    assert "nothing is stored until it runs" in line


@pytest.mark.parametrize("host", ["not a host", "x" * 80])
def test_a_health_address_that_is_none_costs_the_endpoint_alone(host: str) -> None:
    server = HealthServer(host, 0, dict, list)
    assert not server.url and f"no health endpoint on {host}" in server.error
    server.close()
