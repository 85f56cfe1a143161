"""In which of SGLang's processes the plugin sets its hooks."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest

from aurora_sgl.engine import plugin


def run_detokenizer_process(said: Any, functions: tuple[str, ...]) -> None:
    said.put(plugin.runs_one_of(functions))


class Manager:
    @staticmethod
    def run(said: Any, functions: tuple[str, ...]) -> None:
        said.put(plugin.runs_one_of(functions))


HERE = f"{run_detokenizer_process.__module__}."


@pytest.mark.parametrize(
    ("target", "functions", "runs"),
    [
        (run_detokenizer_process, (f"{HERE}other", f"{HERE}run_detokenizer_process"), True),
        (Manager.run, (f"{HERE}Manager.run",), True),
        (run_detokenizer_process, (f"{HERE}other", "other.run_detokenizer_process"), False),
        (run_detokenizer_process, (), False),
    ],
)
def test_a_process_knows_what_it_was_started_to_run(
    target: Any, functions: tuple[str, ...], runs: bool
) -> None:
    spawning = multiprocessing.get_context("spawn")  # as SGLang starts its processes
    said = spawning.Queue()
    process = spawning.Process(target=target, args=(said, functions))
    process.start()
    assert said.get(timeout=60) is runs
    process.join(60)
    assert process.exitcode == 0


def test_the_first_process_runs_none_of_them() -> None:
    assert not plugin.runs_one_of(plugin.WITHOUT_A_MODEL)
