"""Requests whose steps have several draft shapes, and what is true of them, from their events."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Engine, select

from aurora_sgl import store, wire
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.models import AcceptanceEvent, Request
from tests.support import store_samples as samples

SHAPES = (DraftShape(3, 1, 4), DraftShape(3, 4, 8), DraftShape(1, 1, 2), DraftShape(0, 1, 1))
HOUR_US = 3_600_000_000


@dataclass(frozen=True)
class Event:
    request_id: int
    domain: str
    at: datetime
    version_id: int
    shape: DraftShape
    mixed: bool
    verify_steps: int
    accepted: int

    @property
    def hour(self) -> datetime:
        return self.at.replace(minute=0, second=0, microsecond=0)


def fill(engine: Engine, *, requests: int = 40, seed: int = 0) -> int:
    """Ingest requests of two versions in odd pieces; the group's id. A request lies within one
    hour; some are taken over by the next version, and are mixed from then on."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        server_id = queries.servers.register_server(s, group.id, samples.hello()).id
        versions = [samples.add_version(s, group.id, letter) for letter in "ab"]
    rng = random.Random(seed)
    records: list[wire.Record] = []
    for number in range(1, requests + 1):
        records += _request(rng, number, versions)
    envelopes = [(seq, [record]) for seq, record in enumerate(records, 1)]
    begin = 0
    while begin < len(envelopes):
        size = rng.randrange(1, 120)
        ingest(engine, server_id, samples.BOOT, envelopes[max(0, begin - 5) : begin + size])
        begin += size
    return group.id


def _request(rng: random.Random, number: int, versions: list[int]) -> list[wire.Record]:
    begin = samples.START_US // HOUR_US * HOUR_US + rng.randrange(3) * HOUR_US
    version, mixed = rng.choice(versions), False
    chance = rng.choice([0.1, 0.9])  # requests differ
    records: list[wire.Record] = [
        samples.started(number, domain=rng.choice(["chat", "code"]), at_us=begin)
    ]
    steps: list[wire.VerifyStep] = []
    for step in range(rng.randrange(1, 24)):
        shape = rng.choice(SHAPES)
        if rng.random() < 0.04:
            version, mixed = versions[1], True
        one = samples.chain_step(
            number, step, shape.depth if rng.random() < chance else 0, depth=shape.depth,
            version_id=version, at_us=begin + step * 70_000_000, mixed=mixed or rng.random() < 0.1,
            batch_size=rng.randrange(1, 9),
        )  # fmt: skip
        steps.append(_shaped(one, shape))
    return [*records, *steps, samples.finished(number, steps, at_us=begin + HOUR_US - 1)]


def _shaped(step: wire.VerifyStep, shape: DraftShape) -> wire.VerifyStep:
    values = {name: getattr(step, name) for name in step.__struct_fields__}
    values |= {"topk": shape.topk, "nodes": shape.nodes, "proposed": shape.nodes - 1}
    return wire.VerifyStep(**values)


def events(engine: Engine) -> list[Event]:
    """Those with drafts."""
    e, r = AcceptanceEvent, Request
    query = select(e, r.domain).join(r, r.id == e.request_id).where(e.depth > 0)
    with store.session(engine, write=False) as s:
        return [
            Event(
                one.request_id, domain, one.at, one.drafter_version_id,
                DraftShape(one.depth, one.topk, one.nodes), one.mixed, 1, one.accepted,
            )
            for one, domain in s.execute(query)
        ]  # fmt: skip


def truth(
    of: list[Event], key: Callable[[Event], Hashable], *, mixed: bool
) -> dict[Hashable, AcceptCounts]:
    """Sums over whole requests, by a key; with mixed steps or without them."""
    requests: dict[Hashable, dict[int, Event]] = defaultdict(dict)
    for event in of:
        if event.mixed and not mixed:
            continue
        so_far = requests[key(event)]
        old = so_far.get(event.request_id)
        so_far[event.request_id] = event if old is None else replace(
            old, verify_steps=old.verify_steps + 1, accepted=old.accepted + event.accepted
        )  # fmt: skip
    return {name: AcceptCounts.of(own.values()) for name, own in requests.items()}
