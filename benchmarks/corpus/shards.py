"""Shards of the corpus: token ids of prompts and answers, a few hundred bytes a request."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Answered:
    """One request: the prompt's tokens under the chat template, and the target's answer."""

    domain: str
    number: int
    tokens: np.ndarray  # [T] uint16, prompt and answer
    prompt_tokens: int
    conversation: int = -1  # the chat that it is a turn of; -1: one of its own
    temperature: float = 0.0  # 0: greedy

    @property
    def key(self) -> str:
        """Of the conversation."""
        return f"{self.domain}-{self.number if self.conversation < 0 else self.conversation}"


def write_shard(path: Path, answers: Sequence[Answered]) -> None:
    """Written beside its place and renamed into it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        beside,
        tokens=np.concatenate([one.tokens for one in answers]).astype(np.uint16),
        lengths=np.array([len(one.tokens) for one in answers], np.int32),
        prompt_tokens=np.array([one.prompt_tokens for one in answers], np.int32),
        numbers=np.array([one.number for one in answers], np.int32),
        conversations=np.array([one.conversation for one in answers], np.int32),
        temperature=np.array(answers[0].temperature),
        domain=np.array(answers[0].domain),
    )
    beside.rename(path)


def read_shard(path: Path) -> list[Answered]:
    with np.load(path) as file:
        domain = str(file["domain"])
        ends = np.cumsum(file["lengths"])
        parts = np.split(file["tokens"], ends[:-1])
        alone = np.full(len(ends), -1)  # shards from before chats
        chats = file.get("conversations", alone)
        temperature = float(file["temperature"]) if "temperature" in file else 0.0
        rows = zip(file["numbers"], parts, file["prompt_tokens"], chats, strict=True)
        return [Answered(domain, int(n), t, int(p), int(c), temperature) for n, t, p, c in rows]


def shards(domain: str, data: Path = DATA) -> list[Path]:
    return sorted((data / domain).glob("*.npz"))


def answers(domain: str, data: Path = DATA) -> Iterator[Answered]:
    """All answers of a domain, in order."""
    for path in shards(domain, data):
        yield from read_shard(path)
