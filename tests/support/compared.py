"""A store with two real drafters that a real replay set against each other, on requests whose
traces are there: for what compares versions."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.record import record
from aurora_sgl.evaluation.replay import replay_both
from aurora_sgl.evaluation.settings import EvaluationSettings
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.store import queries
from tests.support import dashboard_house as samples
from tests.support.dashboard_house import House
from tests.support.drafter_cases import VOCAB

SETTINGS = EvaluationSettings(depth=3, topk=2, nodes=6, device="cpu", served_dtype="float32")
#: Tokens of a prompt, and of it with its answer.
PROMPT, LENGTH = 6, 40


def fill(home: Path, engine: Engine | None = None, *, count: int = 12) -> tuple[House, int, int]:
    """Versions 1 and 2, and requests whose answers are mostly what version 2 proposes, served by
    version 1; the house and both."""
    house = samples.empty(home, engine)
    samples.add_servers(house)
    now = datetime.now(UTC).replace(microsecond=0)
    one = samples.add_version(house)
    other = samples.add_version(house, one, samples.train(house, one, now, 2.4))
    head = TargetHead.load(home / "target")
    base, better = (
        checkpoint.load(home / "made" / str(number), target_layers=8).eval() for number in (0, 1)
    )
    rng, sequences = random.Random(0), []
    for number in range(count):
        served = house.serve(
            now - timedelta(minutes=count - number), one, domain=f"d{number % 2}", quality=0.3,
            steps=9, rng=rng,
        )  # fmt: skip
        sequences.append(_traced(house, served, followed(better, head, number)))
    before, after = replay_both(base, better, sequences, head, SETTINGS)
    record(house.engine, before, after, candidate_id=other, baseline_id=one, recipe=SETTINGS)
    return house, one, other


def followed(drafter: Drafter, head: TargetHead, number: int) -> Sequence:
    """A request whose answer is what the drafter proposes first, but for every fifth token."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
    features = torch.randn(LENGTH - 1, drafter.config.feature_width, generator=generator)
    with torch.inference_mode():
        for root in range(PROMPT, LENGTH - 1):
            if root % 5:
                at_root = torch.tensor([root])
                (draft,) = drafter.propose(tokens, features, at_root, DraftShape(1), head)
                tokens[root + 1] = draft.tokens[0]
    last = features[:, : drafter.config.hidden_size].clone()
    return Sequence(number, tokens, features, last, PROMPT, domain=f"d{number % 2}")


def _traced(house: House, request_id: int, sequence: Sequence) -> Sequence:
    """Keep the trace of a request, and the sequence under its number."""
    uri = f"traces/20260101/{request_id}.safetensors"
    path = house.home / "artifacts" / uri
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"tokens": sequence.tokens, "aux": sequence.features.contiguous(),
               "last": sequence.last.contiguous()}  # fmt: skip
    metadata = {"request_id": str(request_id), "output_start": str(PROMPT), "greedy": "1"}
    save_file(tensors, str(path), metadata=metadata)
    tokens = sequence.tokens.tolist()
    columns: dict[str, Any] = {"aux_width": sequence.features.shape[1],
                               "last_width": sequence.last.shape[1]}  # fmt: skip
    with store.session(house.engine) as s:
        queries.traces.add_trace(
            s, request_id=request_id, uri=uri, bytes=path.stat().st_size, sha256="", start=0,
            end=len(sequence.features), output_start=PROMPT, prompt_sha256=sha256_ints(
                tokens[:PROMPT]), head_sha256=sha256_ints(tokens[:16]), greedy=True,
            dtype="float32", **columns,
        )  # fmt: skip
    return replace(sequence, request_id=request_id, accept_rule="greedy")
