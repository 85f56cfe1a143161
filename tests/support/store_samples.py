"""Records as the engine sends them, made for the tests of the store."""

from __future__ import annotations

import random
from typing import Any

from sqlalchemy.orm import Session

from aurora_sgl import wire
from aurora_sgl.store import queries

BOOT = 77
START_US = 1_794_999_960_000_000  # 2026-11-18T11:06:00Z


def hello(boot_id: int = BOOT, name: str = "test:30000", live: int = 0) -> wire.Hello:
    server = {
        "name": name,
        "target_model": "target",
        "dtype": "bfloat16",
        "sglang_version": "0.5.21",
    }
    return wire.Hello(boot_id, 1, server, live, 0, 0, {"queue": 0.0})


def started(
    number: int, *, domain: str = "chat", at_us: int = START_US, boot_id: int = BOOT
) -> wire.RequestStarted:
    return wire.RequestStarted(
        request_id=wire.request_id(boot_id, number),
        at_us=at_us,
        rid=f"rid-{number}",
        dp_rank=0,
        domain=domain,
        conversation_hash="",
        prompt_tokens=12,
        cached_tokens=0,
        sampling={"temperature": 0.0},
        may_train=True,
        traced=True,
        speculates=True,
    )


def chain_step(
    number: int,
    step: int,
    accepted: int,
    *,
    depth: int = 3,
    version_id: int = 0,
    at_us: int | None = None,
    mixed: bool = False,
    batch_size: int = 1,
    swap_age: int = 0,
    boot_id: int = BOOT,
) -> wire.VerifyStep:
    """A greedy chain: proposals 100, 101, ...; the target says the same up to the rejection and
    then 900 + step."""
    proposals = [100 + i for i in range(depth)]
    targets = [*proposals[:accepted], 900 + step]
    targets += [5] * (depth + 1 - len(targets))
    return wire.VerifyStep(
        request_id=wire.request_id(boot_id, number),
        step=step,
        at_us=START_US + 1000 * step if at_us is None else at_us,
        version_id=version_id,
        swap_age=swap_age,
        mixed=mixed,
        position=12 + step,
        depth=depth,
        topk=1,
        nodes=depth + 1,
        accept_rule="greedy",
        batch_size=batch_size,
        proposed=depth,
        accepted=accepted,
        kept=accepted + 1,
        first_rejected_at=0 if accepted == depth else accepted + 1,
        draft_tokens=proposals,
        draft_parents=list(range(depth)),
        accepted_nodes=list(range(1, accepted + 1)),
        target_tokens=targets,
    )


def tree_step(number: int, step: int, *, boot_id: int = BOOT) -> wire.VerifyStep:
    """Root 0 with children 1, 2; node 2 is accepted, its children 3, 4 are not. Sampled."""
    return wire.VerifyStep(
        request_id=wire.request_id(boot_id, number),
        step=step,
        at_us=START_US + 1000 * step,
        version_id=0,
        swap_age=0,
        mixed=False,
        position=12 + step,
        depth=2,
        topk=2,
        nodes=5,
        accept_rule="target_sampling",
        batch_size=3,
        proposed=4,
        accepted=1,
        kept=2,
        first_rejected_at=2,
        draft_tokens=[11, 22, 33, 44],
        draft_parents=[0, 0, 2, 2],
        accepted_nodes=[2],
        target_tokens=[22, 49_151],
    )


def finished(
    number: int, steps: list[wire.VerifyStep], *, at_us: int = START_US, boot_id: int = BOOT
) -> wire.RequestFinished:
    return wire.RequestFinished(
        request_id=wire.request_id(boot_id, number),
        at_us=at_us,
        status="finished",
        finish_reason="stop",
        completion_tokens=1 + sum(step.kept for step in steps),
        cached_tokens=0,
        verify_steps=len(steps),
        proposed=sum(step.proposed for step in steps),
        accepted=sum(step.accepted for step in steps),
        retractions=0,
    )


def traffic(
    requests: int, steps: int, *, seed: int = 0, minutes: int = 3
) -> list[tuple[int, list[wire.Record]]]:
    """Envelopes of whole requests, interleaved step by step over a few minutes."""
    rng = random.Random(seed)
    envelopes: list[tuple[int, list[wire.Record]]] = []
    made: dict[int, list[wire.VerifyStep]] = {number: [] for number in range(1, requests + 1)}
    first: list[wire.Record] = [
        started(number, domain=rng.choice(["chat", "code"])) for number in made
    ]
    envelopes.append((1, first))
    for step in range(steps):
        at_us = START_US + step * minutes * 60_000_000 // steps
        records: list[wire.Record] = []
        for number, so_far in made.items():
            if step >= steps - number % 3:  # requests of different lengths
                continue
            new = chain_step(
                number, step, rng.choice([0, 0, 1, 2, 3]), at_us=at_us, batch_size=requests
            )
            so_far.append(new)
            records.append(new)
        envelopes.append((len(envelopes) + 1, records))
    last: list[wire.Record] = [finished(number, so_far) for number, so_far in made.items()]
    envelopes.append((len(envelopes) + 1, last))
    return envelopes


def add_version(s: Session, group_id: int, letter: str, **columns: Any) -> int:
    """A version whose hash is one letter 64 times; its id."""
    version, _ = queries.versions.add_version(
        s,
        **{
            "group_id": group_id,
            "architecture": "LlamaForCausalLMEagle3",
            "weights_uri": f"versions/{letter * 16}/",
            "weights_sha256": letter * 64,
            "vocab_sha256": "0" * 64,
            "draft_vocab_size": 8192,
            "target_model": "target",
            "source": "train",
            **columns,
        },
    )
    return version.id
