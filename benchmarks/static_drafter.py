"""A well-trained static drafter: the fair opponent, and what the demo may start from.

Trains on every answer of the corpus but the held-out ones (and prompts near to theirs), all three
domains, over several passes; its vocabulary is the most frequent tokens of what it trains on. Goes
on where it was killed. The result is a folder in bfloat16, below 25 MB, that ``--drafter`` takes.
``benchmarks/static-drafter`` was made so on an H200: two passes over ``--data`` with 75 shards of
chat, 32 of code and 15 of the narrow form.

    python -m benchmarks.static_drafter [--out DIR] [--passes 4] [--requests N] [--data DIR]

``--requests`` takes only the first so many of each domain: a smaller drafter's training, for tests.
``--data`` is a larger corpus that begins with this one: copy ``benchmarks/data`` and let
``python -m benchmarks.corpus.generate --data`` go on there.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.training.resume import Checkpoints, RunPlan, settings_of
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from benchmarks.corpus.features import CACHE, DOMAINS, CorpusSet, identity, target_folder
from benchmarks.corpus.shards import DATA
from benchmarks.learning import head
from benchmarks.measure import SHAPES, accept_length, measure
from benchmarks.servers import report
from benchmarks.traffic import held_out, stream

LARGEST = 25_000_000  # bytes of the folder
SETTINGS = TrainSettings(
    objective="forward_kl", steps=4, passes=4, replay_share=0.0, checkpoint_seconds=120
)


def training_set(requests: int, data: Path = DATA) -> CorpusSet:
    """Of each domain the first ``requests``."""
    rows = [place for d in DOMAINS for place in stream(d, 0, data=data).part(0, requests).rows]
    return CorpusSet(tuple(rows))


def untrained(rows: CorpusSet, seed: int = 0) -> Drafter:
    """A drafter whose vocabulary is counted over answers, and prompts as far as they leave room."""
    counts = Counter[int]()
    for place in rows.rows:
        one = place.answered
        counts.update({int(t): 0 for t in one.tokens[: one.prompt_tokens]})
        counts.update(one.tokens[one.prompt_tokens :].tolist())
    return scratch.make(target_folder(), counts=counts, seed=seed)


def trained(rows: CorpusSet, settings: TrainSettings, folder: Path) -> Drafter:
    """Train, with checkpoints in ``folder``; a killed run of the same plan goes on."""
    start = untrained(rows, settings.seed)
    checkpoints = Checkpoints(folder, settings.checkpoint_seconds)
    base = checkpoint.content_sha256(checkpoint.tensors_of(start))
    requests = [identity(place.answered) for place in rows.rows]
    checkpoints.begin(RunPlan(settings_of(settings), base, requests, [], [], []))
    result = train(start, rows, head(), settings, checkpoints=checkpoints, progress=_say)
    checkpoints.clear()
    return result.drafter


def _say(event: dict[str, Any]) -> None:
    if event["update"] % 100 == 0:
        print(
            f"{event['update']} of {event['updates']} updates, {event['tokens']} tokens, "
            f"loss {event['loss']:.3f}, {event['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CACHE.parent / "static-drafter")
    parser.add_argument("--passes", type=int, default=SETTINGS.passes)
    parser.add_argument("--requests", type=int, default=10_000, help="of each domain")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    head()
    settings = SETTINGS.model_copy(update={"passes": given.passes})
    rows = training_set(given.requests, given.data)
    tokens = sum(len(p.answered.tokens) - p.answered.prompt_tokens for p in rows.rows)
    print(f"{len(rows)} requests, {tokens} answer tokens", file=sys.stderr, flush=True)
    drafter = trained(rows, settings, CACHE.parent / "static-training")
    # The folder travels: it names the target, not where that lay.
    drafter.config = replace(drafter.config, target_model=target_folder().name)
    folder = checkpoint.save(drafter.to(torch.bfloat16), given.out)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size <= LARGEST, f"{folder} has {size} bytes"
    table = []
    for domain in DOMAINS:
        found = measure(drafter, held_out(domain), head())
        lengths = {shape: accept_length(found, shape) for shape in SHAPES}
        table.append({"domain": domain, "requests": len(rows), **lengths})
    report(f"{folder}: {size / 1e6:.1f} MB", table, as_json=given.json)


if __name__ == "__main__":
    main()
