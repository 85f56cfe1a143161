"""When what was served began and ended, on both databases."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, delete

from aurora_sgl import store
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.models import AcceptanceEvent
from aurora_sgl.store.queries import trends
from aurora_sgl.store.queries.trends import Filter
from tests.support import store_samples as samples

BEGIN = datetime.fromtimestamp(samples.START_US / 1e6, UTC)  # on a minute
SECOND = timedelta(seconds=1)
#: Seconds of the steps of each domain; of chat in four minutes, of code in one.
STEPS = {"chat": (12, 30, 75, 130, 191), "code": (64, 71)}


def serve(engine: Engine) -> tuple[int, int]:
    """Its group and server. A mixed step and one without a draft lie outside of all others."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3").id
        server = queries.servers.register_server(s, group, samples.hello()).id

    def us(seconds: int) -> int:
        return samples.START_US + seconds * 1_000_000

    for number, (domain, seconds) in enumerate(STEPS.items(), 1):
        made = [samples.chain_step(number, i, 1, at_us=us(at)) for i, at in enumerate(seconds)]
        made.append(samples.chain_step(number, 90, 1, at_us=us(1), mixed=True))
        made.append(samples.chain_step(number, 91, 0, at_us=us(2), depth=0))
        records = [samples.started(number, domain=domain), *made]
        ingest(engine, server, samples.BOOT, [(number, records)])
    return group, server


def test_the_first_and_the_last_step_are_told_to_the_moment(engine: Engine) -> None:
    group, server = serve(engine)
    whole = Filter(group, BEGIN, BEGIN + timedelta(minutes=10))
    second = replace(whole, since=BEGIN + 60 * SECOND, until=BEGIN + 120 * SECOND)
    with store.session(engine, write=False) as s:
        for wanted, first, last in (
            (whole, 12, 191),
            (replace(whole, server_ids=(server,), version_ids=(0,)), 12, 191),
            (replace(whole, domains=("code",)), 64, 71),
            (second, 64, 75),
            (replace(second, domains=("chat", "other")), 75, 75),
        ):
            expected = (BEGIN + first * SECOND, BEGIN + last * SECOND)
            assert trends.extent(s, wanted) == expected, wanted
        for nothing in (
            Filter(group, BEGIN - timedelta(hours=1), BEGIN),
            replace(whole, group_id=group + 1),
            replace(whole, version_ids=(7,)),
        ):
            assert trends.extent(s, nothing) is None


def test_when_retention_took_the_events_the_minutes_are_told(engine: Engine) -> None:
    group, _ = serve(engine)
    with store.session(engine) as s:
        s.execute(delete(AcceptanceEvent))
    whole = Filter(group, BEGIN, BEGIN + timedelta(minutes=10))
    minute = timedelta(minutes=1)
    with store.session(engine, write=False) as s:
        assert trends.extent(s, whole) == (BEGIN, BEGIN + 4 * minute)
        code = replace(whole, domains=("code",))
        assert trends.extent(s, code) == (BEGIN + minute, BEGIN + 2 * minute)
