"""Prompts that are nearly the same, found by MinHash over shingles of token ids.

A shingle is a run of five tokens. Those that more than a fifth of the prompts share belong to the
form (a chat template, a system prompt, the wording of a task) and say nothing of what is asked:
they are left out first. Two prompts are near-duplicates when the Jaccard similarity of the rest is
at least 0.7 (Broder, On the resemblance and containment of documents, 1997). Sixteen bands of four
hashes find a pair of that similarity with probability 0.99, and what they find is counted exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from aurora_sgl.hashing import sha256_bytes

Ints = NDArray[np.uint64]

_WIDTH = 5
_LONGEST = 2048  # the last tokens of a prompt that are looked at
_FORM_SHARE, _FORM_LEAST = 0.2, 8  # share, and number, of prompts from which a shingle is form
_SIMILAR = 0.7
_BANDS, _ROWS = 16, 4
_FEWEST = 8  # shingles below which only the very same prompt is a duplicate

_RANDOM = np.random.default_rng(20260101)
_FACTORS: Ints = _RANDOM.integers(0, 1 << 63, (_BANDS * _ROWS, 1), dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)
_PLACES: Ints = _RANDOM.integers(0, 1 << 63, _WIDTH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def near_duplicates(
    prompts: Mapping[int, NDArray[np.int32]],  # token ids, [n] each
) -> dict[int, str]:
    """A key for each prompt that has a near-duplicate among these: theirs in common.

    The key comes from the shingles that most of the group share, so that it stays the same while
    members come and go.
    """
    numbers = list(prompts)
    whole = {n: _shingles(prompts[n]) for n in numbers}
    sets = _without_form(whole)
    parent = {n: n for n in numbers}

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    first: dict[bytes, int] = {}
    for n in numbers:
        names = [np.asarray(prompts[n], dtype=np.int64).tobytes()]
        if len(sets[n]) >= _FEWEST:
            names += _bands(sets[n])
        for place, name in enumerate(names):
            other = first.setdefault(name, n)
            if other != n and (place == 0 or _similarity(sets[n], sets[other]) >= _SIMILAR):
                parent[root(n)] = root(other)
    groups: dict[int, list[int]] = defaultdict(list)
    for n in numbers:
        groups[root(n)].append(n)
    return {
        n: key
        for members in groups.values()
        if len(members) > 1
        for key in [_common([sets[m] if len(sets[m]) else whole[m] for m in members])]
        for n in members
    }


def _shingles(tokens: NDArray[np.int32]) -> Ints:  # ascending, each once
    ids = np.asarray(tokens[-_LONGEST:], dtype=np.uint64) + np.uint64(1)
    if len(ids) < _WIDTH:
        ids = np.concatenate([ids, np.zeros(_WIDTH - len(ids), dtype=np.uint64)])
    windows = np.lib.stride_tricks.sliding_window_view(ids, _WIDTH)
    mixed = (windows * _PLACES).sum(-1, dtype=np.uint64)
    mixed ^= mixed >> np.uint64(29)
    shingles: Ints = np.unique(mixed * _FACTORS[0, 0])
    return shingles


def _without_form(sets: Mapping[int, Ints]) -> dict[int, Ints]:
    if not sets:
        return {}
    values, counts = np.unique(np.concatenate(list(sets.values())), return_counts=True)
    form = values[counts > max(_FORM_LEAST, _FORM_SHARE * len(sets))]
    return {n: np.setdiff1d(own, form, assume_unique=True) for n, own in sets.items()}


def _bands(shingles: Ints) -> list[bytes]:
    mixed = shingles * _FACTORS
    signature = (mixed ^ (mixed >> np.uint64(32))).min(-1).reshape(_BANDS, _ROWS)
    return [bytes([band]) + rows.tobytes() for band, rows in enumerate(signature)]


def _similarity(a: Ints, b: Ints) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def _common(sets: list[Ints]) -> str:
    values, counts = np.unique(np.concatenate(sets), return_counts=True)
    shared = values[2 * counts > len(sets)]
    return "alike:" + sha256_bytes((shared if len(shared) else values)[:1].tobytes())[:16]
