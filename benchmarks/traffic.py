"""The traffic of the learning benchmarks: which requests are served, and which measure.

The first ``HELD_OUT`` answers of a domain measure and are never trained on, nor is a prompt that
nearly repeats one of theirs. The others are served in the corpus's order; each seed begins a third
further on, so that three seeds see different requests for as long as there are enough.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from aurora_sgl.sequences.near_duplicates import near_duplicates
from benchmarks.corpus.features import DOMAINS, CorpusSet, corpus, identity
from benchmarks.corpus.shards import DATA

HELD_OUT = 60

#: one narrow form, broad chat, and both mixed with code
NAMES = ("narrow", "chat", "mixed")


def held_out(name: str) -> CorpusSet:
    """``HELD_OUT`` requests; of a mixture a third from each domain."""
    if name != "mixed":
        return corpus(name).part(0, HELD_OUT)
    return _turns([corpus(domain).part(0, HELD_OUT // len(DOMAINS)) for domain in DOMAINS])


def stream(name: str, seed: int, *, data: Path = DATA) -> CorpusSet:
    """All requests that may be served, in the order of this seed."""
    domains = DOMAINS if name == "mixed" else (name,)
    return _turns([_rotated(_pool(domain, data), seed) for domain in domains])


@lru_cache(maxsize=8)
def _pool(domain: str, data: Path = DATA) -> CorpusSet:
    whole = corpus(domain, data=data)
    prompts = {
        identity(p.answered): p.answered.tokens[: p.answered.prompt_tokens].astype("int64")
        for p in whole.rows
    }
    key = near_duplicates(prompts)
    measured = {key.get(identity(p.answered)) for p in whole.rows[:HELD_OUT]} - {None}
    return CorpusSet(
        tuple(p for p in whole.rows[HELD_OUT:] if key.get(identity(p.answered)) not in measured)
    )


def _rotated(rows: CorpusSet, seed: int) -> CorpusSet:
    begin = (seed % 3) * (len(rows) // 3)
    return rows.part(begin) + rows.part(0, begin)


def _turns(parts: list[CorpusSet]) -> CorpusSet:
    count = min(map(len, parts))
    return CorpusSet(tuple(part.rows[index] for index in range(count) for part in parts))
