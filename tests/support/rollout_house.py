"""A group with versions and a server, and traffic that comes in as the sidecar brings it."""

from __future__ import annotations

import itertools
import random
from datetime import datetime, timedelta

from sqlalchemy import Engine

from aurora_sgl import store, wire
from aurora_sgl.rollout import promote
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from tests.support import store_samples as samples


def to_us(moment: datetime) -> int:
    return int(moment.timestamp() * 1e6)


class RolloutHouse:
    """Versions a, b and c of the group ``default``; a is live. One server, started with a."""

    def __init__(self, engine: Engine, boot_id: int = samples.BOOT) -> None:
        self.engine, self.boot_id = engine, boot_id
        with store.session(engine) as s:
            group = queries.groups.ensure_group(
                s, "default", "target", "", "LlamaForCausalLMEagle3"
            )
            self.group_id = group.id
            self.a, self.b, self.c = (samples.add_version(s, group.id, x) for x in "abc")
            server = queries.servers.register_server(s, group.id, samples.hello(boot_id))
            self.server_id = server.id
            queries.servers.touch_server(
                s, server.id, boot_version_id=self.a, live_version_id=self.a, phase="speculating",
                speculation_share=1.0,
            )  # fmt: skip
        promote(engine, self.a, actor="system", reason="first version of the group")
        self._sequence = itertools.count(1)
        self._numbers = itertools.count(1)

    def follow(self, version_id: int) -> None:
        """The server says that it runs this version."""
        with store.session(self.engine) as s:
            queries.servers.touch_server(s, self.server_id, live_version_id=version_id)

    def say(self, **counters: float) -> None:
        """The engine's next Hello, with these counters."""
        hello = samples.hello(self.boot_id)
        record = wire.Hello(hello.boot_id, 1, hello.server, 0, 0, 0, counters)
        ingest(self.engine, self.server_id, self.boot_id, [(next(self._sequence), [record])])

    def serve(
        self,
        version_id: int,
        rate: float,
        *,
        since: datetime,
        requests: int = 10,
        steps: int = 60,
        step_ms: float = 50.0,
        domain: str = "chat",
        seed: int = 0,
        depth: int = 3,
        mixed: bool = False,
        apart: float = 1.0,
    ) -> datetime:
        """Requests that finish one after another (``apart`` seconds) and accept each proposal with
        probability ``rate``, give or take what a request differs by. When the last one ended."""
        rng = random.Random(seed)
        end = since
        batch: list[tuple[int, list[wire.Record]]] = []
        for _ in range(requests):
            number, mine = next(self._numbers), min(0.98, max(0.02, rng.gauss(rate, 0.05)))
            end += timedelta(seconds=apart)
            made = []
            for step in range(steps):
                accepted = 0
                while accepted < depth and rng.random() < mine:
                    accepted += 1
                back = (steps - step) * step_ms * 1000
                made.append(
                    samples.chain_step(
                        number, step, accepted, depth=depth, version_id=version_id, mixed=mixed,
                        at_us=int(to_us(end) - back), boot_id=self.boot_id,
                    )
                )  # fmt: skip
            records: list[wire.Record] = [
                samples.started(
                    number, domain=domain, at_us=made[0].at_us if made else to_us(end),
                    boot_id=self.boot_id,
                ),
                *made,
                samples.finished(number, made, at_us=to_us(end), boot_id=self.boot_id),
            ]  # fmt: skip
            batch.append((next(self._sequence), records))
        ingest(self.engine, self.server_id, self.boot_id, batch)
        return end
