"""Does the plugin leave the prefix cache as useful as it was? What does a stale draft prefix cost?

Chats of several turns, four at a time behind one system prompt, over the OpenAI endpoint and
without a word about conversations. The same chats on a server without the plugin, and on servers
with it that trace a share of them and have two versions go live in their middle: of all prompt
tokens, which part came from the cache? Aim: 0.98 of the server without.

A prefix that was cached before a swap has draft KV of another version, which costs accept length
only. Served: one more turn of each chat after the swaps, from the cache and then from an empty one.
Replayed (with ``--home``, a data folder of the demo): requests whose whole prompt has draft KV of
the version before.

    python benchmarks/prefix_cache.py [--chats 8] [--turns 6] [--home FOLDER] [--json] [--keep]
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.drafter.beam import beams
from aurora_sgl.drafter.target import TargetHead, read_target
from aurora_sgl.evaluation.compare import load_version, replayable
from aurora_sgl.evaluation.device import as_served
from aurora_sgl.evaluation.replay import RequestReplay, replay_one
from aurora_sgl.evaluation.settings import EvaluationSettings
from aurora_sgl.intervals import Difference, paired_difference
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.scheduler.facts import recipe_as_served
from aurora_sgl.store import queries
from benchmarks.servers import arguments, first_live, put_live, report, server, target
from benchmarks.swap_stall import _relative

SYSTEM = (
    "You are a careful assistant of a small company. You answer briefly and kindly, in plain "
    "words, you say when you do not know something, you never make up numbers or names, you ask "
    "back when a question can be read in two ways, and you end with the next step to take."
)
TOKENS = 24  # of an answer
AT_ONCE = 4
FLAGS = ("--enable-cache-report", "--max-total-tokens", "24576")
SHARES = (0.1, 0.5, 1.0)


class Chat:
    """One conversation; the server's own answers are its history."""

    def __init__(self, url: str, number: int) -> None:
        self.url, self.number = url, number
        self.messages: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
        self.prompt_tokens = self.cached = 0

    def turn(self, turn: int) -> None:
        prompts = sample_prompts()
        text = prompts[(self.number * 17 + turn * 5) % len(prompts)].prompt
        self.messages.append({"role": "user", "content": text})
        body = {
            "model": "m", "messages": self.messages, "temperature": 0, "max_tokens": TOKENS,
        }  # fmt: skip
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=600)
        answer.raise_for_status()
        said = answer.json()
        usage = said["usage"]
        self.prompt_tokens += usage["prompt_tokens"]
        self.cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self.messages.append(
            {"role": "assistant", "content": said["choices"][0]["message"]["content"]}
        )


@contextmanager
def swapping(engine: Any, server_id: int, versions: list[int], done: list[int], whole: int) -> Any:
    """Versions go live in turn as the chats go on: after a third of their turns, and two thirds."""

    def run() -> None:
        for number, version in enumerate(versions, 1):
            while len(done) < number * whole // (len(versions) + 1):
                time.sleep(0.1)
            put_live(engine, server_id, version, force=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join()


def serve(url: str, given: argparse.Namespace, done: list[int]) -> list[Chat]:
    chats = [Chat(url, number) for number in range(given.chats)]

    def run(chat: Chat) -> None:
        for turn in range(given.turns):
            chat.turn(turn)
            done.append(chat.number)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, chats))
    return chats


def versions_of(home: Path | None, engine: Any, into: Path, group_id: int, first: int) -> list[int]:
    """Two versions to put live: the later two of a demo, or a relative of the first one and it."""
    artifacts = ArtifactRoot(str(into / "artifacts"))
    if home is None:
        return [_relative(engine, into, group_id, first), first]
    folders = [folder for _, folder in drafters_of(home)]
    return [import_version(engine, artifacts, folder, group_id).id for folder in folders[-2:]]


def drafters_of(home: Path) -> list[tuple[int, Path]]:
    """(id, folder) of the versions in a data folder, oldest first."""
    engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
    with store.session(engine, write=False) as s:
        group = queries.groups.groups(s)[0]
        rows = queries.versions.versions(s, group.id)
    folder = home / "artifacts" / "versions"
    return sorted((row.id, folder / row.weights_sha256[:16]) for row in rows)


def cached_row(title: str, chats: list[Chat]) -> dict[str, Any]:
    prompts, cached = (sum(getattr(c, name) for c in chats) for name in ("prompt_tokens", "cached"))
    row = {"server": title, "prompt tokens": prompts, "cached": cached, "part": cached / prompts}
    print(row, file=sys.stderr, flush=True)
    return row


def stale_served(url: str, chats: list[Chat]) -> Difference:
    """Accept lengths of one more turn of each chat: behind an empty cache (baseline) and behind
    what other versions left there."""

    def ask(chat: Chat) -> tuple[int, int]:
        body = {
            "model": "m", "temperature": 0, "max_tokens": 2 * TOKENS, "return_meta_info": True,
            "messages": [*chat.messages, {"role": "user", "content": "Say that again, longer."}],
        }  # fmt: skip
        headers = {"x-aurora-speculate": "whole"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=600)
        answer.raise_for_status()
        said = answer.json()
        info = said["choices"][0].get("meta_info") or said["choices"][0].get("metadata") or {}
        return int(info["spec_num_correct_drafts"]), int(info["spec_verify_ct"])

    stale = [ask(chat) for chat in chats]
    httpx.post(f"{url}/flush_cache", timeout=60).raise_for_status()
    fresh = [ask(chat) for chat in chats]
    return paired_difference([(*f, *s) for f, s in zip(fresh, stale, strict=True)])


class StalePrefix:
    """A drafter whose draft KV of the first rows of a text is another's."""

    def __init__(self, live: Any, before: Any, rows: int) -> None:
        self._live, self._before, self._rows = live, before, rows
        self._features: torch.Tensor | None = None
        self._mixed: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live, name)

    def start(self, features: torch.Tensor) -> torch.Tensor:
        self._features = features
        return self._live.start(features)

    def mix(self, embeds: torch.Tensor, hidden: torch.Tensor) -> Any:
        if self._features is not None:
            self._mixed, _ = self._before.mix(embeds, self._before.start(self._features))
            self._features = None
        return self._live.mix(embeds, hidden)

    def keys_values(self, mixed: torch.Tensor, positions: torch.Tensor) -> Any:
        key, value = self._live.keys_values(mixed, positions)
        if self._mixed is not None:
            others, self._mixed = self._before.keys_values(self._mixed, positions), None
            key[: self._rows], value[: self._rows] = (one[: self._rows] for one in others)
        return key, value

    @torch.inference_mode()
    def accepted(self, *args: Any) -> torch.Tensor:
        parts = [beam.accepted() for beam in beams(self, *args)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def stale_replayed(home: Path, model: Path) -> Iterator[dict[str, Any]]:
    """Of each version of a demo that has one before it."""
    os.environ["AURORA_HOME"] = str(home)
    engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
    artifacts = ArtifactRoot(str(home / "artifacts"))
    info, head = read_target(model), TargetHead.load(model)
    with store.session(engine, write=False) as s:
        group = queries.groups.groups(s)[0]
        settings = EvaluationSettings.model_validate(recipe_as_served(s, group.id, {}))
    loaded = [load_version(engine, artifacts, number, info) for number, _ in drafters_of(home)]
    loaded = [as_served(drafter, settings) for drafter in loaded]
    sequences = replayable(
        engine, artifacts, group, loaded[0], settings, 60, None, only_held_out=False
    )
    for (number, _), live, before in zip(drafters_of(home)[1:], loaded[1:], loaded, strict=False):
        pairs: list[tuple[RequestReplay, RequestReplay]] = []
        for sequence in sequences.readable():
            fresh = replay_one(live, sequence, settings.shape, head)
            stale = StalePrefix(live, before, sequence.output_start)
            pairs.append((fresh, replay_one(stale, sequence, settings.shape, head)))  # type: ignore[arg-type]
        sums = [(f.accepted, f.verify_steps, s.accepted, s.verify_steps) for f, s in pairs]
        yield stale_row(f"replay, version {number}", paired_difference(sums))


def stale_row(title: str, found: Difference) -> dict[str, Any]:
    row = {
        "draft KV of prompts": title, "requests": found.requests, "own": found.baseline,
        "stale": found.candidate, "difference": found.difference,
        "from": found.ci_low, "to": found.ci_high,
    }  # fmt: skip
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="capture shares")
    parser.add_argument("--home", type=Path, help="data folder of a demo with three versions")
    given = parser.parse_args()
    model = target(given)
    drafter = given.drafter or (str(drafters_of(given.home)[0][1]) if given.home else None)
    plain = {"AURORA_ENABLED": "0", "AURORA_SPECULATION": "on"}
    with server(model, drafter, flags=FLAGS, environment=plain) as (process, _):
        rows = [cached_row("without the plugin", serve(process.url, given, []))]
    stale = []
    for share in map(float, given.shares.split(",")):
        environment = {"AURORA_CAPTURE_SHARE": str(share), "AURORA_SPECULATION": "on"}
        with server(model, drafter, flags=FLAGS, environment=environment) as (process, home):
            engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
            group_id, server_id, first = first_live(engine)
            versions = versions_of(given.home, engine, home, group_id, first)
            done: list[int] = []
            with swapping(engine, server_id, versions, done, given.chats * given.turns):
                chats = serve(process.url, given, done)
            rows.append(cached_row(f"capture share {share}, two swaps", chats))
            if share == 1.0:
                stale.append(stale_row("served after two swaps", stale_served(process.url, chats)))
    for row in rows:
        row["of without"] = row["part"] / rows[0]["part"]
    if given.home:
        stale += stale_replayed(given.home, model)
    title = "prompt tokens from the prefix cache (aim: 0.98 of the server without the plugin)"
    report(title, rows, as_json=given.json, keep="prefix cache" if given.keep else "")
    if stale:
        title = "what draft KV of other versions costs in accept length"
        report(title, stale, as_json=given.json, keep="stale prefix" if given.keep else "")
    return 0 if all(row["of without"] >= 0.98 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
