"""What the learning benchmarks keep, and how they compare two recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from aurora_sgl.training.settings import TrainSettings
from benchmarks import domain_shift, recipes, results
from benchmarks.ratio import Cell, pooled
from benchmarks.results import Cells, settings_hash


def test_cells_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    cells = Cells("some", tmp_path)
    cells.put({"value": 1}, recipe="a", seed=0)
    with cells.path.open("a") as file:
        file.write('{"key":{"recipe":"b","se')
    again = Cells("some", tmp_path)
    assert again.get(seed=0, recipe="a") == {"value": 1}
    again.put({"value": 2}, recipe="b", seed=0)
    last = Cells("some", tmp_path)
    assert [result["value"] for _, result in last] == [1, 2]


def test_a_cell_of_other_settings_is_not_found() -> None:
    one = TrainSettings()
    assert settings_hash(one) != settings_hash(one.model_copy(update={"passes": 3}))
    assert settings_hash(one) != settings_hash(one, 50)
    assert settings_hash(one) == settings_hash(one.model_copy(update={"threads": 2, "nice": 0}))


def cell(rival: list[int], mine: list[int], *, seed: int = 0) -> Cell:
    steps = [10] * len(rival)

    def measured(accepted: list[int]) -> dict[str, dict[str, list[int]]]:
        return {"chain": {"accepted": accepted, "steps": steps}}

    return Cell("d", seed, 50, measured([0] * len(rival)), measured(rival), measured(mine))


def test_the_ratio_pools_gains_and_counts_only_cells_where_the_rival_gained() -> None:
    cells = [
        cell([1, 1, 1, 1], [2, 2, 2, 2]),
        cell([3, 3, 3, 3], [3, 3, 3, 3], seed=1),
        cell([0, 0, 0, 1], [9, 9, 9, 9], seed=2),  # gained 0.025: not counted
    ]
    found = pooled(cells, "chain", least=0.05)
    assert (found.cells, found.counted) == (3, 2)
    assert found.ratio == pytest.approx(0.5 / 0.4)
    assert found.ci_low == pytest.approx(1.0)  # seed 1 alone
    assert found.ci_high == pytest.approx(2.0)  # seed 0 alone


def test_requests_that_differ_widen_the_interval_of_the_ratio() -> None:
    alike = pooled([cell([2] * 40, [3] * 40)], "chain", least=0.05)
    apart = pooled([cell([2] * 40, [0, 6] * 20)], "chain", least=0.05)
    assert alike.ratio == apart.ratio == pytest.approx(1.5)
    assert alike.ci_high - alike.ci_low == pytest.approx(0)
    assert apart.ci_low < 1.3 < 1.7 < apart.ci_high


def test_what_was_measured_is_found_again_by_the_code_of_today() -> None:
    """A recipe knob that is added later must not hide the committed cells."""
    kept = Path(results.__file__).with_name("results") / "h200"
    found = {key["recipe"] for key, _ in Cells("recipes", kept)}
    recipe = settings_hash(recipes.OURS, recipes.ROUNDS, recipes.HELD_OUT)
    assert recipe in found and len(found) > 20
    shifts = {key["settings"] for key, _ in Cells("domain_shift", kept)}
    assert domain_shift.Shift(400, 600, 0).key("static", 0, "chat")["settings"] in shifts
