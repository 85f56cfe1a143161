"""The draft shape is chosen by what verifying costs on the machine."""

from __future__ import annotations

import pytest

from aurora_sgl.engine.cpu import shape
from aurora_sgl.engine.cpu.shape import BRINGS, Shape
from aurora_sgl.engine.launch import server_flags


def test_where_more_rows_are_nearly_free_trees_are_larger_than_where_each_costs() -> None:
    free = shape.best({rows: 20 + 0.1 * rows for rows in shape.SIZES})
    dear = shape.best({rows: 20 + 4.0 * rows for rows in shape.SIZES})
    assert free.nodes > dear.nodes
    assert dear == Shape(1, 1, 2)


def test_no_shape_is_known_to_bring_more_than_a_deeper_and_larger_one() -> None:
    for one, other in ((a, b) for a in BRINGS for b in BRINGS if a != b):
        if one.steps <= other.steps and one.topk <= other.topk and one.nodes <= other.nodes:
            assert BRINGS[one] <= BRINGS[other]


def test_this_machine_gets_one_of_the_known_shapes() -> None:
    rows = shape.measured()
    assert set(rows) == set(shape.SIZES) and min(rows.values()) > 0
    assert shape.choose() in BRINGS


def test_on_cpu_the_chosen_shape_is_the_default_and_what_a_user_gives_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shape, "choose", lambda: Shape(2, 4, 5))
    flags = server_flags("model", "drafter", "EAGLE3", [], on_cpu=True)
    assert flags[flags.index("--speculative-num-draft-tokens") + 1] == "5"
    given = ["--speculative-num-steps", "4", "--speculative-num-draft-tokens", "5"]
    flags = server_flags("model", "drafter", "EAGLE3", given, on_cpu=True)
    assert flags.count("--speculative-num-steps") == 1 and "--speculative-eagle-topk" not in flags
    flags = server_flags("model", "drafter", "EAGLE3", [], on_cpu=False)
    assert flags[flags.index("--speculative-num-draft-tokens") + 1] == "8"
