"""What several prompts begin with is trained on once, and nothing is lost by it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from aurora_sgl.sequences.shared_prefixes import own_rows
from aurora_sgl.training.settings import TrainSettings

Request = tuple[NDArray[np.int32], int]
#: Tokens on which what a row teaches depends: up to the deepest unrolled step's.
REACH = 2 + TrainSettings.model_fields["steps"].metadata[1].le


def request(prompt: list[int], answer: list[int]) -> Request:
    return np.array([*prompt, *answer], np.int32), len(prompt)


def some_traffic(kind: str, random: np.random.Generator) -> dict[int, Request]:
    """By number, in no order."""

    def text(most: int) -> list[int]:
        return random.integers(0, 50, random.integers(1, most)).tolist()

    system, found = text(300), []
    for _ in range(12):
        if kind == "chats":
            prompt = [*system, *text(60)]
            for _ in range(4):
                answer = text(90)
                found.append(request(prompt, answer))
                prompt = [*prompt, *answer, *text(40)]
        elif kind == "one form":
            found.append(request([*system, *text(40)], text(50)))
        elif kind == "the same again":
            found += [request([*system, 7], text(50)), request([*system, 7], [1, 2, 3])]
        else:
            found.append(request(text(80), text(60)))
    order = random.permutation(len(found))
    return {int(number): found[place] for place, number in enumerate(order)}


@pytest.mark.parametrize("kind", ["chats", "one form", "the same again", "strangers"])
@pytest.mark.parametrize("seed", range(5))
def test_each_row_is_trained_on_where_it_first_stands(kind: str, seed: int) -> None:
    traffic = some_traffic(kind, np.random.default_rng(seed))
    first = own_rows(traffic)
    taught = {
        traffic[number][0][: row + REACH].tobytes()
        for number, (tokens, _) in traffic.items()
        for row in range(first.get(number, 0), len(tokens))
    }
    left_out = 0
    for number, (tokens, prompt) in traffic.items():
        assert first.get(number, 0) < prompt, "an answer is a request's own"
        for row in range(first.get(number, 0)):
            assert tokens[: row + REACH].tobytes() in taught
            left_out += 1
    rows = sum(len(tokens) for tokens, _ in traffic.values())
    assert left_out == 0 if kind == "strangers" else left_out > 0.3 * rows, left_out / rows


def test_which_request_keeps_a_row_does_not_depend_on_their_order() -> None:
    traffic = some_traffic("chats", np.random.default_rng(9))
    backwards = dict(reversed(traffic.items()))
    assert own_rows(traffic) == own_rows(backwards)


def test_of_prompts_without_a_block_in_common_nothing_is_left_out() -> None:
    short = {n: request([1, 2, 3, n], [4, 5]) for n in range(5)}
    assert own_rows(short) == {} == own_rows({})
