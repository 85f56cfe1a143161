"""The draft shape is chosen by what verifying costs on the machine."""

from __future__ import annotations

import pytest
import torch

from aurora_sgl.config import Settings
from aurora_sgl.draft_shape import DraftShape, ReplayedShape
from aurora_sgl.engine import flags as flags_module
from aurora_sgl.engine.cpu import native, start_shape
from aurora_sgl.engine.flags import server_flags


def test_where_more_rows_are_nearly_free_trees_are_larger_than_where_each_costs() -> None:
    free = start_shape.best({rows: 20 + 0.1 * rows for rows in start_shape.SIZES})
    dear = start_shape.best({rows: 20 + 4.0 * rows for rows in start_shape.SIZES})
    assert free.nodes > dear.nodes
    assert dear == DraftShape(1, 1, 2)


@pytest.mark.parametrize("accept_length", [None, 1.2, 1.58, 1.8, 2.2])
def test_no_shape_is_known_to_bring_more_than_a_deeper_and_larger_one(accept_length) -> None:
    known = start_shape.brings(accept_length and ReplayedShape(DraftShape(2, 4, 5), accept_length))
    for one, other in ((a, b) for a in known for b in known if a != b):
        if one.depth <= other.depth and one.topk <= other.topk and one.nodes <= other.nodes:
            assert known[one] <= known[other]


def test_a_drafter_that_replay_found_better_gets_larger_trees() -> None:
    rows = {rows: 20 + 1.0 * rows for rows in start_shape.SIZES}
    young, learnt = (
        start_shape.best(rows),
        start_shape.best(rows, ReplayedShape(DraftShape(2, 4, 5), 1.92)),
    )
    better = start_shape.best(rows, ReplayedShape(DraftShape(3, 4, 6), 2.6))
    assert young.nodes <= learnt.nodes <= better.nodes and young.nodes < better.nodes
    assert start_shape.brings(ReplayedShape(DraftShape(2, 4, 5), 1.92)) == {
        one: learnt for one, (_, learnt) in start_shape.YOUNG_AND_LEARNT.items()
    }
    unknown = ReplayedShape(
        DraftShape(7, 4, 30), 3.0
    )  # a shape of the user's own says nothing of these
    assert start_shape.brings(unknown) == start_shape.brings()


def test_what_is_timed_runs_on_one_thread_and_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    library = native.library()
    if library is None:
        pytest.skip("no C++ compiler")
    ours = library.aurora_threads(2)
    with native.one_thread():
        assert torch.get_num_threads() == 1
        assert library.aurora_threads(1) == 1
    assert library.aurora_threads(ours) == 2 and torch.get_num_threads() == before


def test_this_machine_gets_one_of_the_known_shapes() -> None:
    rows = start_shape.measured()
    assert set(rows) == set(start_shape.SIZES) and min(rows.values()) > 0
    assert start_shape.choose() in start_shape.brings()


def test_on_cpu_the_chosen_shape_is_the_default_and_what_a_user_gives_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(start_shape, "choose", lambda replayed: DraftShape(2, 4, 5))
    for mode, args, nodes in (
        ("auto", [], "8"),  # busy steps take less by themselves
        ("auto", ["--tp-size", "2"], "5"),  # there all steps are alike
        ("on", [], "5"),
    ):
        monkeypatch.setattr(
            flags_module, "get_settings", lambda mode=mode: Settings(speculation=mode)
        )
        flags = server_flags("model", "drafter", "EAGLE3", args, on_cpu=True)
        assert flags[flags.index("--speculative-num-draft-tokens") + 1] == nodes
    given = ["--speculative-num-steps", "4", "--speculative-num-draft-tokens", "5"]
    flags = server_flags("model", "drafter", "EAGLE3", given, on_cpu=True)
    assert flags.count("--speculative-num-steps") == 1 and "--speculative-eagle-topk" not in flags
    flags = server_flags("model", "drafter", "EAGLE3", [], on_cpu=False)
    assert flags[flags.index("--speculative-num-draft-tokens") + 1] == "8"
