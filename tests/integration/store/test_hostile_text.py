"""What clients write stays text on its way through both databases and out of the metrics."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from sqlalchemy import Engine, func, select

from aurora_sgl import clock, store, wire
from aurora_sgl.health import Sample, families
from aurora_sgl.scheduler import metrics
from aurora_sgl.sidecar import health as sidecar_health
from aurora_sgl.sidecar.served import Sums
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import IngestRules, ingest
from aurora_sgl.store.models import AcceptanceEvent, Request, Server
from aurora_sgl.store.queries import explorer
from tests.support import hostile
from tests.support import store_samples as samples

NAMES = hostile.cleaned()


def scraped(of: Iterable[Sample]) -> list[Metric]:
    """What Prometheus reads of these samples."""

    class Once(Collector):
        def collect(self) -> list[Metric]:
            return families(of)

    registry = CollectorRegistry()
    registry.register(Once())
    return list(text_string_to_metric_families(generate_latest(registry).decode()))


def labels_of(read: list[Metric], metric: str, label: str) -> list[str]:
    return [one.labels[label] for family in read for one in family.samples if one.name == metric]


def test_hostile_domains_request_ids_and_server_names_go_through_the_store_as_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(NAMES) > 300
    now_us = int(clock.utc_now().timestamp() * 1e6) - 60_000_000
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        server_id = queries.servers.register_server(s, group.id, samples.hello()).id
        for number, name in enumerate(NAMES[:100], 1000):
            queries.servers.register_server(s, group.id, samples.hello(number, name))
    records: list[wire.Record] = []
    for number, name in enumerate(NAMES, 1):
        start = samples.started(number, domain=name, at_us=now_us)
        step = samples.chain_step(number, 0, 1, at_us=now_us + 1000)
        records += [
            msgspec.structs.replace(start, rid=name, sampling={"stop": [name], name: 1}),
            step,
            samples.finished(number, [step], at_us=now_us + 2000),
        ]
    rules = IngestRules(most_domains=len(NAMES))
    ingest(engine, server_id, samples.BOOT, [(1, records)], rules=rules)

    with store.session(engine, write=False) as s:
        rows = s.execute(select(Request.rid, Request.domain, Request.sampling)
                         .order_by(Request.id)).all()  # fmt: skip
        assert [(row.rid, row.domain) for row in rows] == [(name, name) for name in NAMES]
        assert all(row.sampling["stop"] == [row.rid] for row in rows)
        assert s.scalar(select(func.count()).select_from(AcceptanceEvent)) == len(NAMES)
        assert {*NAMES[:100]} <= set(s.scalars(select(Server.name)))
        for name in NAMES[::40]:
            chosen = explorer.find_requests(s, group.id, domains=[name], limit=5)
            assert [one.domain for one in chosen] == [name]
        monkeypatch.setattr(metrics, "MOST_PAIRS", len(NAMES))
        read = scraped(metrics.of_group(s, group.id))
    assert sorted(labels_of(read, "aurora_accept_length", "domain")) == sorted(NAMES)


@pytest.mark.parametrize("label", ["domain", "place", "code"])
def test_hostile_text_in_a_label_of_the_sidecar_is_read_back_as_it_is(label: str) -> None:
    status = sidecar_health.Status(
        True, "", 1, "0" * 64, "speculating", 1.0, {}, {},
        lost=dict.fromkeys(NAMES, 1.0), notices=dict.fromkeys(NAMES, "x"),
        served={(1, name): Sums(2, 1) for name in NAMES},
    )  # fmt: skip
    metric = {"domain": "aurora_sidecar_accept_length", "place": "aurora_sidecar_lost_total",
              "code": "aurora_sidecar_notice"}[label]  # fmt: skip
    read = scraped(sidecar_health.samples(status))
    assert sorted(labels_of(read, metric, label)) == sorted(NAMES)
    assert {family.name for family in read} == {
        family.name for family in scraped(sidecar_health.samples(status))
    }
