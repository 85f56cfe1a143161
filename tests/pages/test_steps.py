"""What a verify step did, told from the recorded row."""

from __future__ import annotations

from typing import Any

import pytest

from dashboard import tokens
from dashboard.steps import ACCEPTED, BONUS, CORRECTION, PLAIN, tell


def event(**columns: Any) -> dict[str, Any]:
    row = {
        "step": 0, "drafter_version_id": 3, "depth": 2, "topk": 2, "proposed": 4, "accepted": 1,
        "kept": 2, "first_rejected_at": 2, "accept_rule": "greedy", "batch_size": 1,
        "draft_tokens": [11, 22, 33, 44], "draft_parents": [0, 0, 2, 2], "accepted_nodes": [2],
        "target_tokens": [22, 7, 99, 8, 9],
    }  # fmt: skip
    return {**row, **columns}


def kinds(row: dict[str, Any]) -> list[tuple[int, str, bool]]:
    return [(token.id, token.kind, token.cut) for token in tell([row])[0].tokens]


def test_a_rejection_ends_with_the_target_s_correction() -> None:
    # Greedy: the target's token after node 2 stands at number 2.
    assert kinds(event()) == [(22, ACCEPTED, False), (99, CORRECTION, False)]
    # Sampled: along the accepted path, the last one at its end.
    sampled = event(accept_rule="target_sampling", target_tokens=[22, 49_151])
    assert kinds(sampled) == [(22, ACCEPTED, False), (49_151, CORRECTION, False)]


def test_a_draft_that_was_accepted_whole_ends_with_a_bonus() -> None:
    whole = event(accepted=2, kept=3, first_rejected_at=0, accepted_nodes=[2, 3],
                  target_tokens=[22, 7, 33, 5, 9])  # fmt: skip
    assert kinds(whole) == [(22, ACCEPTED, False), (33, ACCEPTED, False), (5, BONUS, False)]


def test_a_step_without_a_draft_is_plain() -> None:
    plain = event(depth=0, proposed=0, accepted=0, kept=1, first_rejected_at=0, draft_tokens=[],
                  draft_parents=[], accepted_nodes=[], target_tokens=[5])  # fmt: skip
    assert kinds(plain) == [(5, PLAIN, False)]
    assert tokens.summary(tell([plain])[0]) == "no draft"


def test_what_a_stop_cut_off_is_marked() -> None:
    assert kinds(event(kept=1)) == [(22, ACCEPTED, False), (99, CORRECTION, True)]
    assert tokens.summary(tell([event(kept=1)])[0]) == (
        "1 of depth 2 accepted, rejected at depth 2, 1 not kept"
    )


def test_proposals_stand_by_depth_with_what_became_of_them() -> None:
    found = [(p.depth, p.token, p.accepted) for p in tell([event()])[0].proposals]
    assert found == [(1, 11, False), (1, 22, True), (2, 33, False), (2, 44, False)]


@pytest.mark.parametrize(
    ("piece", "shown"),
    [(" the", " the"), ("\n", "↵\n"), ("  ", "␣␣"), ("<script>", "&lt;script&gt;"), ("", "∅")],
)
def test_tokens_that_nobody_would_see_are_made_visible_and_none_is_markup(
    piece: str, shown: str
) -> None:
    assert tokens.visible(piece) == shown


def test_a_text_of_another_kind_can_t_leave_its_place() -> None:
    markup = tokens.text(tell([event()]), lambda id: f'"><img src=x onerror=alert({id})>')
    assert "<img" not in markup
