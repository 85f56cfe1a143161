"""What the readers of ``/metrics`` see of a sidecar and a scheduler that know what is secret."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.metric_names import Documented, documented
from tests.support.metrics_house import DOMAIN, MARK, TOKEN, MetricsHouse, metrics

#: Of every label the values that it may have: closed lists, but for versions and domains, of which
#: there are so many at most, and numbers of requests, levels, nodes and positions.
LABELS = {
    "version", "domain", "place", "code", "status", "kind", "verdict", "state", "action", "rule",
    "severity", "target", "position", "requests_at_once", "depth", "nodes", "le",
}  # fmt: skip
NUMBERS = ("version", "position", "requests_at_once", "depth", "nodes")
#: Units as Prometheus's conventions have them, and what stands before them.
SCALED = re.compile(r"(milli|micro|nano|kilo|mega|minutes|hours|percent|_ms\b|_mb\b)")


@pytest.fixture(scope="module")
def read(
    tmp_path_factory: pytest.TempPathFactory, upgraded_sqlite: Path
) -> Iterator[dict[str, tuple[str, str]]]:
    """By process: the address of its metrics, and what they say."""
    home, endpoint = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("e")
    shutil.copy(upgraded_sqlite, home / "aurora.db")
    house = MetricsHouse(home, endpoint)
    yield {
        "sidecar": (house.sidecar_url, metrics(house.sidecar_url)),
        "scheduler": (house.scheduler_url, metrics(house.scheduler_url)),
    }
    house.close()


def parsed(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def exposed(text: str) -> dict[str, Documented]:
    """By name: the kind of each series and its labels."""
    series = {}
    for family in parsed(text):
        total = "_total" if family.type == "counter" else ""
        labels = {name for one in family.samples for name in one.labels} - {"le"}
        series[f"{family.name}{total}"] = Documented(family.type, frozenset(labels))
    return series


PROCESSES = pytest.mark.parametrize("process", ["sidecar", "scheduler"])


@PROCESSES
def test_metrics_hold_domains_and_numbers_and_no_other_text_of_anybody(
    read: dict[str, tuple[str, str]], process: str
) -> None:
    """No text, request id, conversation, token; no reason, actor, error, name of a server."""
    _, text = read[process]
    assert MARK not in text and str(TOKEN)[:5] not in text
    every = [one for family in parsed(text) for one in family.samples]
    labels = {(name, value) for one in every for name, value in one.labels.items()}
    assert {name for name, _ in labels} <= LABELS
    assert {value for name, value in labels if name == "domain"} == {DOMAIN}
    assert all(value.isdigit() for name, value in labels if name in NUMBERS)
    assert all(one.name.startswith("aurora_") for one in every)


@PROCESSES
def test_metrics_are_on_loopback_unless_somebody_chose_otherwise(
    read: dict[str, tuple[str, str]], process: str
) -> None:
    url, _ = read[process]
    assert urlsplit(url).hostname == "127.0.0.1"
    answer = httpx.get(f"{url}/metrics", headers={"Host": "evil.example"}, timeout=5)
    assert (answer.status_code, DOMAIN in answer.text) == (403, False)


@PROCESSES
def test_every_series_is_documented_with_its_kind_and_labels_and_the_other_way_round(
    read: dict[str, tuple[str, str]], process: str
) -> None:
    rows = {
        name: one
        for name, one in documented().items()
        if name.startswith("aurora_sidecar_") == (process == "sidecar")
    }
    assert exposed(read[process][1]) == rows


@PROCESSES
def test_names_go_by_prometheus_conventions(read: dict[str, tuple[str, str]], process: str) -> None:
    """Seconds, bytes; counters are totals and nothing else is; every series says what it is."""
    families = parsed(read[process][1])
    assert len(families) > 25
    for family in families:
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert not SCALED.search(family.name), family.name
        assert family.type == "counter" or not family.name.endswith(("_total", "_count", "_sum"))
        words = family.name.removeprefix("aurora_sidecar_").split("_")
        assert family.documentation.split() not in ([], words), family.name
        if "milli" in family.documentation or "seconds" in family.name:
            assert family.name.endswith("_seconds"), family.name
