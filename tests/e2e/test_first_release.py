"""The oldest supported SGLang, by the same tests as the newest: a short set on its own server.

Only the server's processes run the other release; the tests and its store are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aurora_sgl.doctor import SGLANG_FIRST
from tests.e2e import test_records, test_swap
from tests.e2e.conftest import Running, start
from tests.e2e.test_identity import assert_greedy, serve_and_compare
from tests.e2e.test_records import assert_identities, serve
from tests.e2e.test_sampling import assert_targets_law
from tools.release_packages import packages_of


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, model: Path, trained: Path
) -> Iterator[Running]:
    paths = [str(packages_of(SGLANG_FIRST)), os.environ.get("PYTHONPATH", "")]
    running = start(
        tmp_path_factory.mktemp("first-release"),
        model,
        trained,
        flags=("--chunked-prefill-size", "256", "--max-total-tokens", "4096"),
        environment={"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    yield running
    running.process.stop()
    running.engine.dispose()


def test_it_is_that_release_and_gives_hugging_faces_tokens(
    first: Running, prompts: list[list[int]], hugging_face: Any
) -> None:
    assert first.row().sglang_version == SGLANG_FIRST
    assert serve_and_compare(first, prompts[:8], hugging_face) > 1.1


def test_records_agree_with_its_counters(first: Running, prompts: list[list[int]]) -> None:
    test_records.test_the_answer_can_be_read_off_its_verify_steps(first, prompts)
    answer, row, steps = serve(first, prompts[6], max_new_tokens=24, temperature=1.0)
    assert {step["accept_rule"] for step in steps} == {"target_sampling"}
    assert_identities(answer, row, steps)


def test_its_sampled_requests_follow_the_targets_law(
    first: Running, prompts: list[list[int]], hugging_face: Any
) -> None:
    assert_targets_law(first, prompts[2], hugging_face, temperature=1.0, top_k=3, top_p=0.95)


def test_a_long_prompt_is_served_and_traced_whole(
    first: Running, prompts: list[list[int]], hugging_face: Any
) -> None:
    long = [token for prompt in prompts * 5 for token in prompt][:1500]
    test_swap.flush(first)  # of the first prompt of them all
    answer, row, steps = serve(first, long, max_new_tokens=16, ignore_eos=True)
    assert_greedy(hugging_face, long, answer["output_ids"])
    assert_identities(answer, row, steps)
    trace = test_records.read(first, row.id)
    assert trace.start == 0 and trace.tokens.tolist() == long + answer["output_ids"]
    assert trace.aux.shape[0] >= len(long) + 15
    again, cached, _ = serve(first, long, max_new_tokens=16, ignore_eos=True)
    assert again["output_ids"] == answer["output_ids"] and cached.cached_tokens >= len(long) - 2


def test_a_drafter_goes_live_in_mid_request(
    first: Running, trained: Path, prompts: list[list[int]], hugging_face: Any, tmp_path: Path
) -> None:
    test_swap.test_a_swap_in_mid_request_changes_no_token_and_the_server_reports_what_is_live(
        first, trained, prompts, hugging_face, tmp_path
    )
