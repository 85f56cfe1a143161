"""What should be live reaches the engine: imported, checked, staged, swapped or refused."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.config import TrialSettings
from aurora_sgl.drafter import architectures, checkpoint
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.vocabulary import maps
from aurora_sgl.rollout import promote, rollback, switches, trial
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.sidecar.swap.attempt import BACKOFF_SECONDS
from aurora_sgl.store import queries
from tests.support import store_samples as samples
from tests.support.sidecar_engine import Engine, Sidecar, wait_until

BOOT = 5151
VOCAB, HIDDEN = 40, 16


def make_drafter(folder: Path, seed: int, hidden: int = HIDDEN) -> Path:
    config = DrafterConfig(
        architecture=EAGLE3,
        hidden_size=hidden,
        intermediate_size=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        vocab_size=VOCAB,
        draft_vocab_size=17,
        rms_norm_eps=1e-5,
        rope_theta=100.0,
        max_positions=64,
        aux_layers=(1, 2, 3),
    )
    torch.manual_seed(seed)
    drafter = architectures.build(config)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    drafter.d2t, drafter.t2d = maps(torch.arange(3, 20), VOCAB)
    return checkpoint.save(drafter, folder)


class World:
    """A sidecar, an engine that was started with a drafter, and a store to look into."""

    def __init__(self, tmp_path: Path, **settings: object) -> None:
        self.tmp_path = tmp_path
        self.home, endpoint = tmp_path / "home", tmp_path / "e"
        self.booted = make_drafter(tmp_path / "booted", 0)
        self.sidecar = Sidecar(self.home, endpoint, **settings)
        self.engine = Engine(
            endpoint,
            BOOT,
            drafter_path=str(self.booted),
            drafter_source="scratch",
            target_hidden_size=HIDDEN,
            target_vocab_size=VOCAB,
            target_num_layers=6,
            live_sha256=checkpoint.content_sha256(checkpoint.read_tensors(self.booted)),
        )
        self.engine.run()
        self.artifacts = ArtifactRoot(str(self.home / "artifacts"))
        wait_until(lambda: self.server().get("boot_version_id"), 40, "an identified server")
        wait_until(lambda: self.rows("SELECT * FROM deployment"), 40, "a first live version")
        self.db = store.connect(f"sqlite:///{self.home / 'aurora.db'}")

    def close(self) -> None:
        self.sidecar.stop()  # takes what it staged out of shared memory
        self.engine.close()
        self.db.dispose()

    def rows(self, query: str) -> list[dict[str, Any]]:
        """By a plain connection: an engine of ours for each of many looks costs more than them."""
        place = f"file:{self.home / 'aurora.db'}?mode=ro"
        with closing(sqlite3.connect(place, uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query)]

    def server(self) -> dict[str, Any]:
        return next(iter(self.rows("SELECT * FROM server")), {})

    def add(self, seed: int, hidden: int = HIDDEN) -> int:
        folder = make_drafter(self.tmp_path / f"drafter-{seed}", seed, hidden)
        return import_version(self.db, self.artifacts, folder, "default", source="train").id

    def staged(self) -> list[wire.Stage]:
        return [command for command in self.engine.heard if isinstance(command, wire.Stage)]


@pytest.fixture
def world(tmp_path: Path, home: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def test_the_drafter_of_the_start_becomes_the_first_live_version_and_version_0_means_it(
    world: World,
) -> None:
    boot = world.server()["boot_version_id"]
    wait_until(lambda: wire.Identify(boot) in world.engine.heard)
    (version,) = world.rows("SELECT * FROM drafter_version")
    assert (version["id"], version["source"]) == (boot, "scratch")
    (deployment,) = world.rows("SELECT * FROM deployment")
    assert (deployment["version_id"], deployment["actor"]) == (boot, "system")
    assert deployment["reason"] == "first version of the group"
    world.engine.send(samples.started(1, boot_id=BOOT))
    world.engine.send(samples.chain_step(1, 0, 2, boot_id=BOOT))
    (event,) = wait_until(lambda: world.rows("SELECT * FROM acceptance_event"))
    assert event["drafter_version_id"] == boot
    wait_until(lambda: world.server()["live_version_id"] == boot)
    assert world.server()["live_sha256"] == version["weights_sha256"]
    wait_until(lambda: world.sidecar.get("/healthz")[0] == 200)


def test_a_promoted_version_goes_live_and_a_rollback_brings_the_old_one_back(
    world: World,
) -> None:
    boot = world.server()["boot_version_id"]
    new = world.add(1)
    promote(world.db, new, actor="test", reason="better")
    wait_until(lambda: world.server()["live_version_id"] == new)
    (version,) = world.rows(f"SELECT * FROM drafter_version WHERE id = {new}")
    wait_until(lambda: world.server()["live_sha256"] == version["weights_sha256"])
    time.sleep(2.5)
    (stage,) = world.staged()
    assert stage.path.startswith("/dev/shm/") and stage.weights_sha256 == version["weights_sha256"]
    wait_until(lambda: not os.path.exists(stage.path))
    rollback(world.db, "default", actor="test", reason="worse")
    wait_until(lambda: world.server()["live_version_id"] == boot)
    assert len(world.staged()) == 2
    wait_until(lambda: "swaps_applied_total 2.0" in world.sidecar.get("/metrics")[1])


def test_damaged_weights_never_reach_the_engine_and_are_not_tried_in_a_tight_loop(
    world: World,
) -> None:
    boot = world.server()["boot_version_id"]
    bad = world.add(1)
    (version,) = world.rows(f"SELECT * FROM drafter_version WHERE id = {bad}")
    weights = world.home / "artifacts" / version["weights_uri"] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    promote(world.db, bad, actor="test", reason="damaged on the disk")
    wait_until(lambda: "not what was stored" in world.server()["last_error"])
    assert world.sidecar.get("/healthz")[0] == 503
    noticed = time.monotonic()
    wait_until(lambda: world.sidecar.text().count("not what was stored") > 1, 30, "the second try")
    # The first try was noticed up to a moment late, the second one likewise.
    assert time.monotonic() - noticed > 0.5 * BACKOFF_SECONDS[0]
    assert world.staged() == []
    weights.write_bytes(data[:-200])
    wait_until(lambda: "broken or cut short" in world.server()["last_error"], 15)
    assert world.server()["live_version_id"] == boot
    assert not list(Path("/dev/shm").glob(f"aurora-sgl-*-{world.sidecar.process.pid}-*"))
    rollback(world.db, "default", actor="test", reason="damaged")
    wait_until(lambda: world.server()["last_error"] == "")
    good = world.add(2)
    promote(world.db, good, actor="test", reason="sound")
    wait_until(lambda: world.server()["live_version_id"] == good)


def test_a_drafter_for_another_target_is_refused_before_the_engine_hears_of_it(
    world: World,
) -> None:
    other = world.add(1, hidden=32)
    promote(world.db, other, actor="test", reason="wrong size")
    wait_until(lambda: "does not fit this server" in world.server()["last_error"])
    assert world.staged() == []


def test_what_the_engine_refuses_is_in_its_row_and_waits_before_the_next_try(
    world: World,
) -> None:
    new = world.add(1)
    world.engine.refuse = "it shares storage with the target"
    promote(world.db, new, actor="test", reason="better")
    wait_until(lambda: "shares storage" in world.server()["last_error"])
    wait_until(lambda: len(world.engine.staged_at) > 1, 30, "the second try")
    first, second = world.engine.staged_at[:2]
    assert second - first > 0.9 * BACKOFF_SECONDS[0]
    world.engine.refuse = ""
    wait_until(lambda: world.server()["live_version_id"] == new, 15)
    wait_until(lambda: world.server()["last_error"] == "", 15, "the answer with the hash")


def test_what_the_model_holds_is_hashed_and_not_what_was_staged(world: World) -> None:
    new = world.add(1)
    world.engine.forgets = True
    promote(world.db, new, actor="test", reason="better")
    wait_until(lambda: "hash read back from the model" in world.server()["last_error"])
    (version,) = world.rows(f"SELECT * FROM drafter_version WHERE id = {new}")
    assert world.server()["live_sha256"] != version["weights_sha256"]
    world.engine.forgets = False
    wait_until(
        lambda: world.server()["live_sha256"] == version["weights_sha256"], 30, "the second try"
    )


def test_a_sidecar_that_was_killed_finds_its_engine_and_the_newest_version_again(
    world: World,
) -> None:
    new = world.add(1)
    promote(world.db, new, actor="test", reason="better")
    wait_until(lambda: world.server()["live_version_id"] == new)
    world.sidecar.kill()
    newer = world.add(2)
    promote(world.db, newer, actor="test", reason="better still")
    world.sidecar.start()
    wait_until(lambda: world.server()["live_version_id"] == newer)
    assert len(world.rows("SELECT * FROM server")) == 1


def test_speculation_goes_from_a_share_to_all_steps_when_replay_says_that_it_pays(
    world: World,
) -> None:
    boot = world.server()["boot_version_id"]
    wait_until(lambda: world.server()["phase"] == "exploring")
    assert world.server()["speculation_share"] == pytest.approx(0.1)
    world.engine.counters |= {"step_ms_plain": 50.0, "step_ms_spec": 65.0}
    with store.session(world.db) as s:
        queries.evaluations.add_evaluation(
            s,
            candidate_id=boot,
            baseline_id=None,
            kind="replay",
            requests=40,
            verdict="pass",
            candidate_accept_length=1.5,
        )
    wait_until(lambda: world.server()["phase"] == "speculating")
    wait_until(lambda: world.engine.counters["speculation_share"] == 1.0)
    assert "1.50 (replay), break-even 1.30" in world.server()["phase_reason"]
    assert any(
        isinstance(command, wire.SetPhase) and "1.50 (replay), break-even 1.30" in command.reason
        for command in world.engine.heard
    )
    world.engine.send(samples.started(1, boot_id=BOOT))
    now = wire.now_us()
    for step in range(250):
        world.engine.send(samples.chain_step(1, step, 0, boot_id=BOOT, at_us=now))
    wait_until(lambda: world.server()["phase"] == "exploring")


def test_a_server_follows_the_windows_of_a_trial_and_comes_back_by_itself(world: World) -> None:
    boot, new = world.server()["boot_version_id"], world.add(1)
    wait_until(lambda: world.server()["live_version_id"] == boot)
    rules = TrialSettings(pairs=3, window_seconds=5, warm_seconds=0)
    trial.start(world.db, new, actor="test", reason="a trial", settings=rules, seed=1)
    with store.session(world.db) as s:  # one window of the candidate, which nobody closes
        now = utc_now()
        queries.trials.add_trial_window(s, 1, 1, new, now, now + timedelta(seconds=6))
    wait_until(lambda: world.server()["live_version_id"] == new)
    wait_until(lambda: world.server()["live_version_id"] == boot)
    assert [row["action"] for row in world.rows("SELECT action FROM deployment")] == ["promote"]


def test_while_learning_is_switched_off_the_engine_captures_nothing(world: World) -> None:
    world.engine.counters["capture_share"] = 1.0
    switches.turn(world.db, "default", "learning", False, actor="test", reason="x")
    wait_until(lambda: world.engine.counters["capture_share"] == 0.0, 5)
    switches.turn(world.db, "default", "learning", True, actor="test", reason="x")
    wait_until(lambda: world.engine.counters["capture_share"] == 1.0, 5)


def test_the_metrics_tell_accept_lengths_by_version_and_domain_and_how_long_a_swap_held_up(
    world: World,
) -> None:
    boot, new = world.server()["boot_version_id"], world.add(1)
    world.engine.counters |= {"failures": 3.0, "parts_down": 1.0}
    world.engine.counters |= {
        "tree_share_4_2_6": 0.75, "tree_length_4_2_6": 1.9, "tree_explored_4": 5.0
    }  # fmt: skip
    world.engine.send(samples.started(1, boot_id=BOOT, domain="code"))
    at = wire.now_us()
    for step, accepted in enumerate((2, 1)):
        world.engine.send(
            samples.chain_step(1, step, accepted, boot_id=BOOT, swap_age=90 + step, at_us=at)
        )
    promote(world.db, new, actor="test", reason="better")
    wait_until(lambda: world.server()["live_version_id"] == new)
    world.engine.send(
        samples.chain_step(
            1, 2, 3, boot_id=BOOT, version_id=new, mixed=True, swap_age=0, at_us=at + 70_000
        )
    )

    def text() -> str:
        found = world.sidecar.get("/metrics")[1]
        done = f'version="{new}"' in found and 'swap_apply_seconds_bucket{le="0.001"} 1.0' in found
        return found if done and "engine_failures_total 3.0" in found else ""

    told = wait_until(text)
    assert f'aurora_sidecar_accept_length{{domain="code",version="{boot}"}} 2.5' in told
    assert f'aurora_sidecar_draft_steps_total{{domain="code",version="{new}"}} 1.0' in told
    assert "aurora_sidecar_engine_parts_down 1.0" in told
    tree = 'depth="2",nodes="6",requests_at_once="4"'
    assert f"aurora_sidecar_tree_share{{{tree}}} 0.75" in told
    assert f"aurora_sidecar_tree_accept_length{{{tree}}} 1.9" in told
    assert 'aurora_sidecar_tree_explored_total{requests_at_once="4"} 5.0' in told
    assert "aurora_sidecar_longest_swap_stall_seconds 0.07" in told
    assert 'aurora_sidecar_swap_stall_seconds_bucket{le="0.1"} 1.0' in told
    assert world.sidecar.get("/health")[0] == world.sidecar.get("/healthz")[0]
    (swap,) = wait_until(lambda: world.rows("SELECT * FROM swap WHERE longest_stall_ms > 0"))
    assert (swap["version_id"], swap["ok"], swap["apply_ms"]) == (new, 1, 1.0)
    assert swap["longest_stall_ms"] == 70.0
