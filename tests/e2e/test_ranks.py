"""Servers of several processes: two tensor-parallel ranks, and two data-parallel replicas."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.rollout import promote
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.store import queries
from tests.e2e.conftest import PROMPTS, Running, start, until
from tests.support import breaking
from tests.support.random_llama import greedy_tokens, make_drafter, make_target

TOKENS = 24


@dataclass
class Ranked:
    """A server, the tokens that it must answer with, and a second drafter."""

    running: Running
    prompts: list[list[int]]
    answers: list[list[int]]
    other: Path
    breaks: Path  # names the part of a swap that raises on the second rank

    def serve(self) -> list[dict[str, Any]]:
        """Every prompt, four at a time; the answers must be Hugging Face's."""

        def one(ids: list[int]) -> dict[str, Any]:
            return dict(self.running.generate(ids, max_new_tokens=TOKENS, ignore_eos=True))

        with ThreadPoolExecutor(4) as pool:
            served = list(pool.map(one, self.prompts))
        for answer, wanted in zip(served, self.answers, strict=True):
            assert answer["output_ids"] == wanted
        return served

    def servers(self) -> list[Any]:
        with store.session(self.running.engine, write=False) as s:
            return list(queries.servers.servers(s, self.running.group_id))

    def promote_other(self) -> int:
        artifacts = ArtifactRoot(str(self.running.home / "artifacts"))
        engine, group = self.running.engine, self.running.group_id
        version = import_version(engine, artifacts, self.other, group).id
        promote(engine, version, actor="test", reason="another drafter")
        return int(version)

    def until_live(self, version: int) -> None:
        until(
            lambda: {row.live_version_id for row in self.servers()} == {version},
            180,
            "every server to have the other drafter",
        )

    def refused(self) -> list[str]:
        """Why swaps were refused, the newest first."""
        with store.session(self.running.engine, write=False) as s:
            rows = queries.swaps.swaps(s, self.running.group_id)
            return [row.reason for row in rows if not row.ok]

    def promote_while_the_second_rank_fails(self) -> int:
        """In each part of a swap, one after the other. Nobody waits for that rank for ever, and
        what was live is served."""
        live = {row.live_version_id for row in self.servers()}
        version = 0
        for part in breaking.SWAP_BREAKS:
            self.breaks.write_text(part)
            tries = len(self.refused())
            version = version or self.promote_other()
            until(lambda tries=tries: len(self.refused()) > tries, 120, f"what {part} breaks")
            assert "another rank" in self.refused()[0]
            self.serve()
            assert {row.live_version_id for row in self.servers()} == live
        self.breaks.write_text("")
        return version


@pytest.fixture(params=[("--tp-size", "2"), ("--dp-size", "2")], ids=["tp 2", "dp 2"])
def ranked(
    request: pytest.FixtureRequest, tmp_path: Path, model: Path
) -> Iterator[tuple[str, Ranked]]:
    from transformers import AutoTokenizer

    target = make_target(tmp_path / "target", model)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:8]]
    answers = greedy_tokens(target, prompts, TOKENS)
    drafters = [
        make_drafter(target, answers, tmp_path / f"drafter-{seed}", seed) for seed in (0, 1)
    ]
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # SGLang asks for it on one NUMA node
    breaks = tmp_path / "breaks"
    breaks.write_text("")
    if request.param[0] == "--tp-size":
        cores |= {breaking.SWAPS: str(breaks), **breaking.installed(tmp_path / "plugin")}
    running = start(tmp_path / "home", target, drafters[0], flags=request.param, environment=cores)
    yield request.param[0], Ranked(running, prompts, answers, drafters[1], breaks)
    running.process.stop()
    running.engine.dispose()


def test_tokens_records_and_a_swap_hold_over_ranks(ranked: tuple[str, Ranked]) -> None:
    kind, world = ranked
    replicas = 2 if kind == "--dp-size" else 1
    until(lambda: len(world.servers()) == replicas, 60, "a row for each replica")
    assert len({row.name for row in world.servers()}) == replicas
    before = world.serve()
    ranks = kind == "--tp-size"
    version = world.promote_while_the_second_rank_fails() if ranks else world.promote_other()
    world.until_live(version)
    after = world.serve()
    rows = [world.running.request(one["meta_info"]["id"], 60) for one in before + after]
    assert all(row.status == "finished" for row in rows)
    assert all(row.completion_tokens == TOKENS for row in rows), "each token is recorded once"
    assert len({row.server_id for row in rows}) == replicas, "every replica served some"
    drafted = set()
    for number, row in enumerate(rows):
        events = world.running.events(row.id)
        assert events and sum(event["accepted"] + 1 for event in events) >= TOKENS - 1
        drafted |= {(number >= len(before), event["drafter_version_id"]) for event in events}
    assert {late for late, _ in drafted} == {False, True}
    assert {named for late, named in drafted if late} == {version}
    hashes = {row.live_sha256 for row in world.servers()}
    with store.session(world.running.engine, write=False) as s:
        assert hashes == {queries.versions.version(s, version).weights_sha256}
