"""Two real servers on one PostgreSQL: both follow what is live, also after one is killed in mid
swap, and every verify step stands under the version that drafted it.

The two versions draft from vocabularies that share no token, so the proposals of a step, as the
server recorded them, tell by themselves which drafter made them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.drafter.vocabulary import stop_tokens
from aurora_sgl.rollout import promote, status
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.store import queries
from tests.e2e.conftest import Running, start, until

DRAFT_TOKENS = 2048


class Traffic(threading.Thread):
    """Requests one after another to one server, until it is told to end or the server is gone."""

    def __init__(self, server: Running, prompts: list[list[int]]) -> None:
        super().__init__(daemon=True)
        self.server, self.prompts, self.ending = server, prompts, threading.Event()
        self.answers = 0
        self.error: Exception | None = None

    def run(self) -> None:
        while not self.ending.is_set():
            try:
                prompt = self.prompts[self.answers % len(self.prompts)]
                self.server.generate(prompt, max_new_tokens=16)
            except (httpx.HTTPError, AssertionError) as error:
                self.error = error
                return
            self.answers += 1


@dataclass
class Pair:
    """Two servers that were started with version ``a``; ``b`` is not live yet."""

    servers: list[Running]
    engine: Engine
    model: Path
    shared: dict[str, str]
    drafters: dict[int, Path]  # by version id
    words: dict[int, set[int]]  # tokens that only this version drafts
    a: int
    b: int

    def live(self) -> set[int | None]:
        return {server.live_version() for server in self.servers}


@pytest.fixture
def pair(tmp_path: Path, postgres_database: str, model: Path) -> Iterator[Pair]:
    shared = {"database_url": postgres_database, "artifacts": str(tmp_path / "artifacts")}
    folders, words = [], []
    ends = stop_tokens(model)
    for number in range(2):  # even and odd token ids
        counts = {token: 1 for token in range(100 + number, 100 + 2 * DRAFT_TOKENS, 2)}
        drafter = scratch.make(model, counts=counts, draft_vocab_size=DRAFT_TOKENS, seed=number)
        folders.append(checkpoint.save(drafter, tmp_path / "drafters" / "ab"[number]))
        words.append(set(drafter.target_ids.tolist()) - ends)
    assert not words[0] & words[1]

    def begin(number: int) -> Running:
        home = tmp_path / f"home{number}"
        return start(home, model, folders[0], dtype="bfloat16", shared=shared)

    engine = store.connect(postgres_database)
    store.upgrade(engine)
    with ThreadPoolExecutor(2) as pool:
        servers = list(pool.map(begin, range(2)))
    try:
        (a,) = {server.live_version() for server in servers}
        assert a is not None
        artifacts = ArtifactRoot(shared["artifacts"])
        b = import_version(engine, artifacts, folders[1], servers[0].group_id).id
        yield Pair(
            servers, engine, model, shared,
            {a: folders[0], b: folders[1]}, {a: words[0], b: words[1]}, a, b,
        )  # fmt: skip
    finally:
        for server in servers:
            server.process.stop()
            server.engine.dispose()
        engine.dispose()


def is_swapping(server: Running, version_id: int) -> bool:
    """Whether the engine was told to load the version and has not answered."""
    told = (server.home / "logs" / "sidecar.log").read_text()
    sent = f"version {version_id} is staged for the swap" in told
    return sent and f"version {version_id} is live" not in told


def drafted_by(pair: Pair, event: dict[str, Any]) -> set[int]:
    """The versions whose own tokens are among the proposals."""
    return {v for v, words in pair.words.items() if words & set(event["draft_tokens"])}


def test_a_server_that_is_killed_in_mid_swap_comes_back_to_what_is_live(
    pair: Pair, prompts: list[list[int]]
) -> None:
    killed, other = pair.servers
    assert killed.group_id == other.group_id and killed.server_id != other.server_id
    traffic = [Traffic(server, prompts[number::2]) for number, server in enumerate(pair.servers)]
    for thread in traffic:
        thread.start()
    until(lambda: all(thread.answers >= 2 for thread in traffic), 120, "answers of version a")

    promote(pair.engine, pair.b, actor="test", reason="while one of the two dies")
    deadline = time.monotonic() + 120
    while not is_swapping(killed, pair.b):
        assert time.monotonic() < deadline, "the swap never began"
        time.sleep(0.002)
    killed.process.kill()
    traffic[0].join(60)
    assert traffic[0].error is not None, "it died in the middle of its traffic"
    assert killed.live_version() == pair.a, "the swap was never reported"
    until(lambda: other.live_version() == pair.b, 120, "the other server to go on alone")
    since = traffic[1].answers
    until(lambda: traffic[1].answers > since + 1, 120, "the other server to serve on")

    home = killed.home
    port = int(killed.url.rpartition(":")[2])
    killed.engine.dispose()
    pair.servers[0] = again = start(
        home, pair.model, pair.drafters[pair.a], dtype="bfloat16", port=port, shared=pair.shared
    )  # with the drafter of old, as its unit file says
    more = Traffic(again, prompts)
    more.start()
    until(lambda: pair.live() == {pair.b}, 120, "both on the same version")
    since = more.answers
    until(lambda: more.answers > since + 1, 120, "answers of version b")
    for thread in (more, traffic[1]):
        thread.ending.set()
        thread.join(60)
        assert thread.error is None

    def converged() -> bool:
        rows = status.servers(pair.engine, "default")
        return len(rows) == 2 and all(row.converged for row in rows)

    until(converged, 90, "both to say so, and the boot that died to be known as gone")
    with store.session(pair.engine, write=False) as s:
        wanted = queries.versions.version(s, pair.b).weights_sha256

    def hashes() -> set[str]:
        with store.session(pair.engine, write=False) as s:
            return {row.live_sha256 for row in queries.servers.servers(s, again.group_id)}

    until(lambda: hashes() == {wanted}, 30, "the hashes of what was read back")
    # The last answer of the one that was killed may have died with it, before it was recorded.
    answered = traffic[0].answers - 1 + traffic[1].answers + more.answers
    assert attribution(pair, answered) >= {
        (killed.server_id, pair.a),
        (other.server_id, pair.a),
        (other.server_id, pair.b),
        (again.server_id, pair.b),
    }
    assert again.server_id != killed.server_id, "a boot has a row of its own"


def attribution(pair: Pair, answered: int) -> set[tuple[int, int]]:
    """Holds every event to its version; (server id, version id) of those that were seen."""

    def finished() -> list[Any]:
        with store.reading(pair.engine) as connection:
            rows = connection.execute(text("SELECT id, server_id, status FROM request")).all()
        return rows if sum(row.status == "finished" for row in rows) >= answered else []

    seen: Counter[tuple[int, int]] = Counter()
    for row in until(finished, 120, "every answer in the store"):
        with store.session(pair.engine, write=False) as s:
            events = queries.events.events(s, row.id)
        for event in events:
            if event["depth"]:
                version = event["drafter_version_id"]
                assert drafted_by(pair, event) == {version}, (row, event["step"])
                seen[row.server_id, version] += 1
    assert sum(seen.values()) > 100
    return set(seen)
