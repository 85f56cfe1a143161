"""When what was served began and ended, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import store_samples as samples
from sqlalchemy import Engine, delete

from aurora_sgl import store
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.models import AcceptanceEvent
from aurora_sgl.store.queries import trends
from aurora_sgl.store.queries.trends import Filter

BEGIN = datetime.fromtimestamp(samples.START_US / 1e6, UTC)  # on a minute
SECOND = timedelta(seconds=1)
#: Seconds of the steps of each domain; of chat in four minutes, of code in one.
STEPS = {"chat": (12, 30, 75, 130, 191), "code": (64, 71)}


def serve(engine: Engine) -> tuple[int, int]:
    """Its group and server. A mixed step and one without a draft lie outside of all others."""
    with store.session(engine) as s:
        group = queries.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3").id
        server = queries.register_server(s, group, samples.hello()).id

    def us(seconds: int) -> int:
        return samples.START_US + seconds * 1_000_000

    for number, (domain, seconds) in enumerate(STEPS.items(), 1):
        made = [samples.chain_step(number, i, 1, at_us=us(at)) for i, at in enumerate(seconds)]
        made.append(samples.chain_step(number, 90, 1, at_us=us(1), mixed=True))
        made.append(samples.chain_step(number, 91, 0, at_us=us(2), depth=0))
        records = [samples.started(number, domain=domain), *made]
        ingest(engine, server, samples.BOOT, [(number, records)])
    return group, server


def test_the_first_and_the_last_step_of_each_domain_are_told_to_the_moment(
    engine: Engine,
) -> None:
    group, server = serve(engine)
    with store.session(engine, write=False) as s:
        whole = trends.extents(s, Filter(group, BEGIN, BEGIN + timedelta(minutes=10)))
        assert whole == {
            (0, domain): (BEGIN + at[0] * SECOND, BEGIN + at[-1] * SECOND)
            for domain, at in STEPS.items()
        }
        second = Filter(group, BEGIN + 60 * SECOND, BEGIN + 120 * SECOND, (server,))
        assert trends.extents(s, second) == {
            (0, "chat"): (BEGIN + 75 * SECOND, BEGIN + 75 * SECOND),
            (0, "code"): (BEGIN + 64 * SECOND, BEGIN + 71 * SECOND),
        }
        assert trends.extents(s, Filter(group, BEGIN - timedelta(hours=1), BEGIN)) == {}
        assert trends.extents(s, Filter(group + 1, BEGIN, BEGIN + timedelta(minutes=10))) == {}


def test_when_retention_took_the_events_the_minutes_are_told(engine: Engine) -> None:
    group, _ = serve(engine)
    with store.session(engine) as s:
        s.execute(delete(AcceptanceEvent))
    with store.session(engine, write=False) as s:
        found = trends.extents(s, Filter(group, BEGIN, BEGIN + timedelta(minutes=10)))
    assert found[0, "chat"] == (BEGIN, BEGIN + timedelta(minutes=4))
    assert found[0, "code"] == (BEGIN + timedelta(minutes=1), BEGIN + timedelta(minutes=2))
