"""A swap on one rank: staged, applied at one step, told with its hash; or refused with a reason."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from aurora_sgl import wire  # noqa: E402
from aurora_sgl.drafter.checkpoint import content_sha256  # noqa: E402
from aurora_sgl.engine.draft_kv import LiveVersion  # noqa: E402
from aurora_sgl.engine.swap import Swapper  # noqa: E402
from aurora_sgl.engine.swap_driver import ApplySwap, StageSwap, SwapDriver  # noqa: E402


def hash_of(path: Path) -> str:
    return content_sha256(load_file(str(path)))


class House:
    """A drafter of one layer, its swapper, and what was reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = torch.nn.Module()
        self.model.fc = torch.nn.Linear(4, 4, bias=False)
        self.live = LiveVersion()
        self.reports: list[wire.SwapDone] = []
        self.path = Path()  # of what is staged
        self.swapper = Swapper(self.model, torch.nn.Linear(2, 2), None, 40)
        self.driver = SwapDriver(self.swapper, self.live, 7, tp_size=1, report=self.hear)

    def hear(self, record: wire.Record) -> None:
        """The sidecar."""
        if isinstance(record, wire.LiveCopied):
            self.driver.hashed(wire.LiveHash(record.version_id, hash_of(self.path)))
        elif isinstance(record, wire.SwapDone):
            self.reports.append(record)

    def weights(self, value: float, **change: Any) -> tuple[Path, str]:
        tensors = {"fc.weight": torch.full((4, 4), value), **change}
        path = self.folder / f"{value}.safetensors"
        save_file(tensors, str(path))
        return path, content_sha256(tensors)

    def ask(self, version: int, path: Path, sha256: str, deadline_us: int = 0) -> None:
        self.path = path
        self.driver.ask(wire.Stage(version, str(path), sha256, deadline_us))

    def run(self, seconds: float = 10.0) -> wire.SwapDone:
        """The scheduler's loop, until something is reported."""
        begun, count = time.monotonic(), len(self.reports)
        while len(self.reports) == count:
            assert time.monotonic() < begun + seconds, "nothing was reported"
            if (command := self.driver.next_command()) is not None:
                self.driver.obey(command)
            self.driver.work()
            time.sleep(0.002)
        return self.reports[-1]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_version_goes_live_at_one_step_and_its_hash_is_read_back(house: House) -> None:
    path, sha256 = house.weights(2.0)
    house.ask(5, path, sha256)
    report = house.run()
    assert (report.version_id, report.ok, report.reason) == (5, True, "")
    assert report.live_sha256 == sha256 and house.live.version_id == 5
    assert house.live.swap_count == 1 and house.live.steps_since_swap == 0
    assert torch.equal(house.model.fc.weight, torch.full((4, 4), 2.0))


def test_one_version_after_another_goes_live(house: House) -> None:
    for number in (1, 2, 3):
        house.ask(number, *house.weights(float(number)))
        assert house.run().ok
    assert house.live.swap_count == 3 and bool((house.model.fc.weight == 3.0).all())


def test_a_second_swap_is_refused_while_one_is_staged(house: House) -> None:
    house.ask(5, *house.weights(2.0))
    house.driver.ask(wire.Stage(6, "elsewhere", "", 0))
    (refusal,) = house.reports
    assert (refusal.version_id, refusal.ok) == (6, False) and "another swap" in refusal.reason
    assert house.run().version_id == 5 and house.live.version_id == 5


@pytest.mark.parametrize("kind", ["missing", "cut short", "other shape", "unknown", "lacking"])
def test_weights_that_do_not_fit_are_refused_and_the_live_ones_stay(
    house: House, kind: str
) -> None:
    path, sha256 = house.weights(2.0)
    if kind == "missing":
        path = house.folder / "nowhere.safetensors"
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-8])
    elif kind == "other shape":
        path, sha256 = house.weights(4.0, **{"fc.weight": torch.zeros(2, 4)})
    elif kind == "unknown":
        path, sha256 = house.weights(5.0, **{"fd.weight": torch.zeros(2, 4)})
    else:
        path = house.folder / "lacking.safetensors"
        save_file({"embed_tokens.weight": torch.zeros(2, 4)}, str(path))
    before = house.model.fc.weight.clone()
    house.ask(5, path, sha256)
    report = house.run()
    assert not report.ok and report.reason and "\n" not in report.reason
    assert torch.equal(house.model.fc.weight, before) and house.live.swap_count == 0
    house.ask(6, *house.weights(7.0))
    assert house.run().ok, "the next one goes live"


def test_a_swap_that_was_staged_too_late_is_refused(house: House) -> None:
    path, sha256 = house.weights(2.0)
    house.ask(5, path, sha256, deadline_us=wire.now_us() - 1)
    report = house.run()
    assert not report.ok and "longer than" in report.reason and house.live.swap_count == 0


def test_a_copy_that_fails_is_told_and_raised(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Swapper, "apply", fail)
    house.ask(5, *house.weights(2.0))
    with pytest.raises(RuntimeError, match="out of memory"):
        house.run()
    assert not house.reports[-1].ok and "copying failed" in house.reports[-1].reason
    assert house.live.swap_count == 0


def test_without_a_command_there_is_nothing_to_do(house: House) -> None:
    assert house.driver.next_command() is None


def test_the_ranks_are_told_to_stage_before_they_are_told_to_apply(house: House) -> None:
    house.ask(5, *house.weights(2.0))
    first = house.driver.next_command()
    assert isinstance(first, StageSwap) and first.version_id == 5
    house.driver.obey(first)
    begun = time.monotonic()
    while (then := house.driver.next_command()) is None and time.monotonic() < begun + 10:
        house.driver.work()
        time.sleep(0.002)
    assert then == ApplySwap(5)
    assert house.driver.next_command() is None, "it is not asked again at once"


def until_live(house: House, version: int) -> None:
    begun = time.monotonic()
    while house.live.version_id != version or house.swapper.busy:
        assert time.monotonic() < begun + 10
        if (command := house.driver.next_command()) is not None:
            house.driver.obey(command)
        house.driver.work()


def test_a_hash_that_never_comes_leaves_the_version_live_without_one(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.driver, "hashed", lambda _: None)
    house.ask(5, *house.weights(2.0), deadline_us=wire.now_us() + 1_500_000)
    report = house.run()
    assert (report.version_id, report.ok, report.live_sha256) == (5, True, "")
    monkeypatch.undo()
    house.ask(6, *house.weights(3.0))
    assert house.run().live_sha256, "the next one has it again"


def test_a_sidecar_that_asks_for_the_next_version_does_not_wait_for_the_hash_of_the_last(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(house.driver, "hashed", lambda _: None)
        house.ask(5, *house.weights(2.0))
        until_live(house, 5)
        house.driver.work()
        assert house.reports == []
    house.ask(6, *house.weights(3.0))
    assert [(one.version_id, one.ok, one.live_sha256) for one in house.reports] == [(5, True, "")]
    assert house.run().version_id == 6
    house.driver.hashed(wire.LiveHash(5, "0" * 64))  # too late: nobody is asked any more
    assert len(house.reports) == 2


def test_a_step_moves_four_megabytes_at_most_and_an_idle_server_goes_on_faster(
    tmp_path: Path,
) -> None:
    def works(*, idle: bool) -> int:
        house = House(tmp_path)
        house.model.fc = torch.nn.Linear(1024, 6 * 1024, bias=False)  # 24 MB
        house.swapper = Swapper(house.model, torch.nn.Linear(2, 2), None, 40)
        path = tmp_path / "large.safetensors"
        save_file({"fc.weight": torch.zeros(6 * 1024, 1024)}, str(path))
        house.swapper.begin_staging(1, path, "")
        count = 0
        while house.swapper.busy:
            house.driver._swapper = house.swapper
            house.driver.work(idle=idle)
            count += 1
        assert house.swapper.staged is not None
        return count

    assert works(idle=False) >= 24 / 4 and works(idle=True) < works(idle=False)


def test_staging_that_takes_too_long_is_given_up(house: House) -> None:
    house.ask(5, *house.weights(2.0), deadline_us=wire.now_us() + 100_000)
    command = house.driver.next_command()
    assert command is not None
    house.driver.obey(command)
    time.sleep(0.15)
    assert house.swapper.busy, "nobody has worked on it"
    then = house.driver.next_command()
    assert then == ApplySwap(5)
    house.driver.obey(then)
    assert "longer than" in house.reports[-1].reason and not house.swapper.busy
    house.ask(6, *house.weights(3.0))
    assert house.run().ok
