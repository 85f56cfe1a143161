"""The draft vocabulary: which of the target's tokens a drafter may propose.

A checkpoint carries it twice, as published EAGLE3 drafters do: ``d2t`` holds the target id less
the draft id of each draft token, ``t2d`` says for each target id whether it is among them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from aurora_sgl.errors import AuroraError


def choose(
    counts: Mapping[int, int],
    size: int,
    vocab_size: int,
    *,
    always: Iterable[int] = (),
) -> torch.Tensor:  # [size] int64, ascending
    """The ``size`` most frequent target ids, and ``always`` (end of sequence and the like).

    What the counts leave open is filled with the lowest ids: a BPE vocabulary is ordered by the
    frequency of its merges, so these are the commonest pieces of the tokenizer's own corpus.
    """
    size = min(size, vocab_size)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    picked = dict.fromkeys(token for token in (*always, *ranked) if 0 <= token < vocab_size)
    for token in range(vocab_size):
        if len(picked) >= size:
            break
        picked.setdefault(token)
    return torch.tensor(sorted(list(picked)[:size]), dtype=torch.int64)


def renew(
    target_ids: torch.Tensor,  # [size] int64
    counts: Mapping[int, int],
    vocab_size: int,
    *,
    always: Iterable[int] = (),
) -> torch.Tensor:  # [size] int64, ascending
    """The vocabulary with its rarest tokens exchanged for more frequent ones outside of it.

    A token comes in only where it was counted more often than the one that it takes the place of:
    no more rows change than coverage gains from. ``always`` never leaves.
    """
    held = set(target_ids.tolist())
    kept = held & set(always)
    outside = sorted(
        (t for t in counts if t not in held and 0 <= t < vocab_size), key=lambda t: (-counts[t], t)
    )
    inside = sorted(held - kept, key=lambda t: (counts.get(t, 0), -t))
    for comes, goes in zip(outside, inside, strict=False):
        if counts[comes] <= counts.get(goes, 0):
            break
        held.remove(goes)
        held.add(comes)
    return torch.tensor(sorted(held), dtype=torch.int64)


def maps(target_ids: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``d2t`` [size] int64 and ``t2d`` [vocab] bool of ascending target ids."""
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    return target_ids - torch.arange(len(target_ids)), t2d


def inverse(target_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:  # [vocab] int64
    """Draft id of each target id; -1 outside the draft vocabulary."""
    draft_of = torch.full((vocab_size,), -1, dtype=torch.int64, device=target_ids.device)
    draft_of[target_ids] = torch.arange(len(target_ids), device=target_ids.device)
    return draft_of


def complete(
    tensors: Mapping[str, torch.Tensor],  # of a checkpoint
    draft_vocab_size: int,
    vocab_size: int,
) -> dict[str, torch.Tensor]:
    """The tensors with ``d2t`` as int64 and with ``t2d``, which some checkpoints leave out.

    One that drafts from the whole vocabulary may leave out both: a draft id is the target's then,
    as SGLang takes it.
    """
    whole = dict(tensors)
    if "d2t" not in whole and draft_vocab_size == vocab_size:
        whole["d2t"] = torch.zeros(vocab_size, dtype=torch.int64)
    if "d2t" not in whole or whole["d2t"].dim() != 1:
        return whole
    if "t2d" not in whole:
        ids = whole["d2t"].to(torch.int64) + torch.arange(len(whole["d2t"]))
        whole["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        whole["t2d"][ids.clamp(0, vocab_size - 1)] = True
    whole["d2t"], whole["t2d"] = whole["d2t"].to(torch.int64), whole["t2d"].to(torch.bool)
    return whole


def problems(
    d2t: torch.Tensor,  # [draft_vocab] int64
    t2d: torch.Tensor,  # [vocab] bool
) -> list[str]:
    """Why two maps are no draft vocabulary; empty when they are one."""
    ids, size = d2t + torch.arange(len(d2t)), len(t2d)
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        return [f"d2t points outside the target's vocabulary of {size}"]
    if len(set(ids.tolist())) != len(ids):
        return ["d2t names a target token twice"]
    expected = torch.zeros(size, dtype=torch.bool)
    expected[ids] = True
    return [] if bool((expected == t2d).all()) else ["d2t and t2d disagree"]


def coverage(counts: Mapping[int, int], target_ids: torch.Tensor) -> float:
    """Share of the counted tokens that the draft vocabulary holds, in [0, 1]."""
    total = sum(counts.values())
    held = set(target_ids.tolist())
    return sum(n for token, n in counts.items() if token in held) / total if total else 0.0


def count_tokens(target: Path, texts: Iterable[str]) -> Counter[int]:
    """Token counts of texts under a target's own tokenizer.

    Raises ``AuroraError`` when the folder holds no ``tokenizer.json``.
    """
    from tokenizers import Tokenizer

    path = Path(target) / "tokenizer.json"
    if not path.exists():
        raise AuroraError(f"no tokenizer.json in {target}: cannot count tokens of sample texts")
    tokenizer = Tokenizer.from_file(str(path))
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.ids)
    return counts


def stop_tokens(target: Path) -> set[int]:
    """End-of-sequence ids named by a target's ``config.json`` and ``generation_config.json``."""
    tokens: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = Path(target) / name
        if not path.exists():
            continue
        raw: dict[str, Any] = json.loads(path.read_text())
        value = raw.get("eos_token_id")
        tokens.update([value] if isinstance(value, int) else value or [])
    return tokens
