"""The trainer on a small world that can be learned: a fixed successor for every token."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from aurora_sgl.drafter import scratch
from aurora_sgl.drafter.checkpoint import content_sha256, tensors_of
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.errors import AuroraError
from aurora_sgl.evaluation.gate import Judgement, judge
from aurora_sgl.evaluation.replay import replay, replay_both
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training import resume
from aurora_sgl.training.objectives import OBJECTIVES
from aurora_sgl.training.resume import Checkpoints, RunPlan
from aurora_sgl.training.scale import backend_of, on_own_device, train_on_workers
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from tests.support.drafter_cases import HIDDEN, RECIPE, VOCAB, good_drafter, requests, target_folder


def world(folder: Path) -> tuple[Drafter, TargetHead]:
    target = target_folder(folder)
    drafter = scratch.make(target, draft_vocab_size=VOCAB, seed=1)
    return drafter, TargetHead.load(target)


def judged(base, candidate, held_out, head, settings: TrainSettings) -> Judgement:
    replays = replay_both(base, candidate, held_out, head, settings)
    return judge(*replays, fewest=settings.min_gate_requests, seed=settings.seed)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_raises_the_replayed_accept_length_on_held_out_requests(
    tmp_path: Path, objective: str
) -> None:
    drafter, head = world(tmp_path / "t")
    settings = TrainSettings(objective=objective, **RECIPE)
    held_out = requests(head, 12, seed=7)
    before = content_sha256(tensors_of(drafter))
    result = train(drafter, requests(head, 30), head, settings)
    assert content_sha256(tensors_of(drafter)) == before, "the given drafter must not change"
    verdict = judged(drafter, result.drafter, held_out, head, settings)
    assert verdict.verdict == "pass"
    # Rewards are rare for an untrained policy: the pure policy gradient starts slowly.
    least = 0.3 if objective == "policy_gradient" else 0.7
    assert verdict.overall.candidate > verdict.overall.baseline + least
    assert set(verdict.by_domain) == {"d0", "d1"}
    if objective in ("forward_kl", "lk", "expected_accept_length"):  # the same loss all the time
        assert result.metrics["loss_last_pass"] < result.metrics["loss_first_pass"]
    assert result.updates == 8 * 6 and result.tokens == 8 * 30 * 22


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    data = requests(head, 4)
    hashes = [
        content_sha256(
            tensors_of(train(drafter, data, head, TrainSettings(seed=s, passes=1)).drafter)
        )
        for s in (1, 1, 3)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_worse_drafter_fails_the_gate_and_the_same_one_is_inconclusive(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    settings = TrainSettings(**RECIPE)
    good = good_drafter()
    held_out = requests(head, 12, seed=7)
    assert judged(good, drafter, held_out, head, settings).verdict == "fail"
    assert judged(good, good, held_out, head, settings).verdict == "inconclusive"
    assert judged(drafter, good, held_out[:3], head, settings).verdict == "inconclusive"
    assert judged(drafter, good, [], head, settings).verdict == "inconclusive"


def test_early_stop_keeps_the_best_average_on_the_dev_split(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    settings = TrainSettings(**{**RECIPE, "passes": 40, "patience": 2})
    dev = requests(head, 8, seed=5)
    result = train(drafter, requests(head, 20), head, settings, dev=dev)
    history = result.metrics["dev_accept_length"]
    assert len(history) < 40 and history[-3:].index(max(history[-3:])) == 0
    again = AcceptCounts.of(replay(result.drafter, dev, settings.shape, head)).accept_length
    assert again == pytest.approx(max(history))


@pytest.mark.parametrize("objective", ["forward_kl", "tree_reward"])
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(
    tmp_path: Path, objective: str
) -> None:
    drafter, head = world(tmp_path / "t")
    good, bad = requests(head, 2)
    bad.last[8] = float("nan")
    settings = TrainSettings(objective=objective, passes=1, batch_requests=2, rl_share=1.0)
    with pytest.raises(AuroraError, match="not finite at update 0"):
        train(drafter, [good, bad], head, settings)


def test_no_requests_is_an_error_and_unreadable_ones_are_passed_over(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    with pytest.raises(AuroraError, match="no requests"):
        train(drafter, [], head, TrainSettings())

    class Gone(list[Sequence]):
        def __getitem__(self, index: Any) -> Any:
            if index % 2 or len(self) == 1:
                raise AuroraError("trace x is missing or cut short")
            return super().__getitem__(index)

    result = train(drafter, Gone(requests(head, 6)), head, TrainSettings(passes=1))
    assert result.updates == 3 and result.metrics["unreadable"] == 3
    with pytest.raises(AuroraError, match="none of the requests could be trained on"):
        train(drafter, Gone(requests(head, 1)), head, TrainSettings(passes=1))


def test_without_the_prompt_only_answer_positions_count(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    data = requests(head, 2)
    everything = train(drafter, data, head, TrainSettings(passes=1)).tokens
    answers = train(drafter, data, head, TrainSettings(passes=1, train_on_prompt=False)).tokens
    # 24 tokens, 23 features: rows 0..21 have a target; the answer's rows start at 5.
    assert (everything, answers) == (2 * 22, 2 * 17)


def test_long_requests_are_trained_on_their_last_rows(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    settings = TrainSettings(passes=1, max_rows=8)
    assert train(drafter, requests(head, 3), head, settings).tokens == 3 * 8


def test_a_time_limit_ends_the_run_and_its_rate_schedule(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    reports: list[dict[str, Any]] = []
    settings = TrainSettings(passes=10_000, max_seconds=1.0)
    result = train(drafter, requests(head, 10), head, settings, progress=reports.append)
    assert 0 < result.updates < 100_000
    assert result.metrics["seconds"] < 5
    assert len(reports) == result.updates


def test_settings_name_the_field_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="objective must be one of"):
        TrainSettings(objective="magic")
    with pytest.raises(ValueError, match="leave nothing"):
        TrainSettings(dev_share=0.5, gate_share=0.5)
    with pytest.raises(ValueError, match="pases"):
        TrainSettings(pases=3)  # type: ignore[call-arg]
    assert HIDDEN == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    with pytest.raises(AuroraError, match="no GPU cuda for training"):
        train(drafter, requests(head, 2), head, TrainSettings(device="cuda"))


def test_parts_of_a_request_and_batches_add_up_to_the_same_update(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    data = requests(head, 4)
    # An objective without a border that rounding may cross (see test_packed.py for the others).
    plain = {"passes": 1, "autocast": False, "warmup": 0, "schedule": "constant", "ema": 0.0,
             "objective": "forward_kl"}  # fmt: skip
    for batch in ({"batch_requests": 1}, {"batch_requests": 4}, {"batch_tokens": 60}):
        whole, parts = (
            train(drafter, data, head, TrainSettings(**plain, **batch, piece_bytes=size))
            for size in (64 << 20, 4 * 40 * 8)
        )
        assert whole.updates == parts.updates and whole.tokens == parts.tokens == 4 * 22
        for a, b in zip(whole.drafter.parameters(), parts.drafter.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    assert [
        train(drafter, data, head, TrainSettings(**plain, **batch)).updates
        for batch in ({"batch_requests": 3}, {"batch_tokens": 40})
    ] == [2, 2]


def test_a_killed_run_goes_on_to_the_very_weights_of_one_that_was_not(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    data, dev = requests(head, 6), requests(head, 4, seed=5)
    settings = TrainSettings(passes=3, checkpoint_seconds=1e-9, patience=3)
    plan = RunPlan({}, "base", [1], [2], [3], [4])
    whole = train(drafter, data, head, settings, dev=dev)

    class Killed(BaseException):
        pass

    for at in (1, 6, 11, 14):
        kept = Checkpoints(tmp_path / f"kept-{at}", settings.checkpoint_seconds, share=1e9)
        kept.begin(plan)

        def die(event: dict[str, Any], at: int = at) -> None:
            if event["update"] == at:
                raise Killed

        with pytest.raises(Killed):
            train(drafter, data, head, settings, dev=dev, checkpoints=kept, progress=die)
        again = Checkpoints(tmp_path / f"kept-{at}", settings.checkpoint_seconds, share=1e9)
        again.begin(plan)
        rest = train(drafter, data, head, settings, dev=dev, checkpoints=again)
        assert rest.metrics.get("resumed_at", 0) == at - 1
        assert rest.updates == whole.updates and rest.tokens == whole.tokens
        assert rest.metrics["dev_accept_length"] == whole.metrics["dev_accept_length"]
        for a, b in zip(whole.drafter.parameters(), rest.drafter.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_broken_checkpoint_or_another_plan_starts_anew(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    data, settings = requests(head, 3), TrainSettings(passes=1, checkpoint_seconds=1e-9)
    kept = Checkpoints(tmp_path / "kept", 1e-9, share=1e9)
    kept.begin(RunPlan({}, "base", [1], [], [], []))
    train(drafter, data, head, settings, checkpoints=kept)
    state = tmp_path / "kept" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    result = train(drafter, data, head, settings, checkpoints=kept)
    assert result.updates == 3 and "resumed_at" not in result.metrics
    kept.begin(RunPlan({}, "base", [1, 2], [], [], []))
    assert kept.load() is None and not state.exists()


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    (tmp_path / "file").write_text("in the way of a folder")
    kept = Checkpoints(tmp_path / "file" / "kept", 1e-9, share=1e9)
    kept.begin(RunPlan({}, "base", [1], [], [], []))
    result = train(drafter, requests(head, 2), head, TrainSettings(passes=1), checkpoints=kept)
    assert result.updates == 2 and "no checkpoint" in result.metrics["checkpoint_error"]


def test_checkpoints_take_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    kept = Checkpoints(tmp_path / "kept", 60.0)
    kept.begin(RunPlan({}, "base", [1], [], [], []))
    kept.expect(int(6.8e9))
    due = []
    for second in range(4000):
        now = 1000.0 + second
        if kept.is_due:
            due.append(second)

            def slow() -> dict[str, Any]:
                nonlocal now
                now += 10.0
                return {"x": torch.zeros(2)}

            kept.save(slow)
    assert due[0] == 680, "50 times 13.6 s, which 6.8 GB are thought to take"
    assert all(510 <= b - a <= 511 for a, b in itertools.pairwise(due)) and len(due) == 7
    assert kept.load() is not None and not kept.error


def test_without_room_on_the_disk_there_is_no_checkpoint_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drafter, head = world(tmp_path / "t")
    kept = Checkpoints(tmp_path / "kept", 1e-9, share=1e9)
    kept.begin(RunPlan({}, "base", [1], [], [], []))
    monkeypatch.setattr(resume, "_LEFT_FREE", 1 << 60)
    result = train(drafter, requests(head, 3), head, TrainSettings(passes=1), checkpoints=kept)
    assert result.updates == 3 and not (tmp_path / "kept" / "state.pt").exists()
    assert "too little is free" in result.metrics["checkpoint_error"]
    lines = [r.getMessage() for r in caplog.records if "checkpoint" in r.getMessage()]
    assert len(lines) == 1 and "training goes on" in lines[0]
    monkeypatch.undo()
    again = train(drafter, requests(head, 3), head, TrainSettings(passes=1), checkpoints=kept)
    assert "checkpoint_error" not in again.metrics and kept.load() is not None


def test_time_in_which_progress_blocks_does_not_count(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    settings = TrainSettings(passes=2, max_seconds=30.0)
    blocked, calls = 0.0, 0

    def progress(event: object) -> None:
        nonlocal blocked, calls
        start = time.monotonic()
        time.sleep(0.2)
        blocked, calls = blocked + time.monotonic() - start, calls + 1

    start = time.monotonic()
    result = train(drafter, requests(head, 4), head, settings, progress=progress)
    elapsed = time.monotonic() - start
    assert result.updates == 8 and calls >= 8
    assert result.metrics["seconds"] < elapsed - 0.9 * blocked


@pytest.mark.slow
def test_two_workers_come_to_the_weights_of_one(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray starts its workers at 15: beside another test they would wait for minutes.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    drafter, head = world(tmp_path / "t")
    data, dev = requests(head, 6), requests(head, 3, seed=5)
    settings = TrainSettings(
        passes=2, batch_requests=2, autocast=False, patience=5, objective="forward_kl"
    )
    seen: list[dict[str, Any]] = []
    one = train(drafter, data, head, settings, dev=dev)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    request.addfinalizer(ray.shutdown)
    two = train_on_workers(
        drafter, data, head, settings.model_copy(update={"workers": 2}),
        dev=dev, progress=seen.append,
    )  # fmt: skip
    assert (two.updates, two.tokens) == (one.updates, one.tokens) == (6, 12 * 22)
    assert [one["event"] for one in seen if one["event"] != "pass"] == ["update"] * 6
    assert seen[-1]["event"] == "pass"  # how it came out ends the run
    assert two.metrics["dev_accept_length"] == pytest.approx(one.metrics["dev_accept_length"])
    for a, b in zip(one.drafter.parameters(), two.drafter.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    data[2].last[8] = float("nan")
    with pytest.raises(AuroraError, match="the loss is not finite"):
        train_on_workers(drafter, data, head, settings.model_copy(update={"workers": 2}))


def test_workers_on_gpus_add_up_host_numbers_too_and_each_has_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As far as a CPU can show it: which backend serves which device, and what Ray names."""
    config = torch.distributed.distributed_c10d.BackendConfig(
        torch.distributed.Backend(backend_of(True))
    )
    assert config.device_backend_map["cpu"] == "gloo"
    assert config.device_backend_map["cuda"] == "nccl"
    assert backend_of(False) == "gloo"
    devices = iter(["cuda:0", "cuda:3", "cpu"])
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device(next(devices)))
    given = [on_own_device(TrainSettings(device="auto", workers=2)).device for _ in range(3)]
    assert given == ["cuda:0", "cuda:3", "cpu"]


def test_a_small_window_is_passed_over_until_the_least_number_of_updates(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    data = requests(head, 6)
    given = {**RECIPE, "passes": 1}
    few = train(drafter, data, head, TrainSettings(**given, least_updates=20))
    assert few.updates == 20  # ten passes of two
    enough = train(drafter, data, head, TrainSettings(**given, least_updates=2))
    assert enough.updates == 2


def test_the_time_limit_is_counted_by_the_given_clock(tmp_path: Path) -> None:
    drafter, head = world(tmp_path / "t")
    ticks = iter(range(10_000))
    settings = TrainSettings(**{**RECIPE, "passes": 100}, max_seconds=30)
    result = train(drafter, requests(head, 6), head, settings, clock=lambda: float(next(ticks)))
    assert 2 <= result.updates <= 40
