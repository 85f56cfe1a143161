"""deploy/monitoring with its real tools: promtool, a Prometheus, Grafana's own schema.

Grafana itself is in no registry that this project may use; what reads its board here is the library
that its makers generate from its schema, and a Prometheus that is asked what each panel asks.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from tests.support.metric_names import METRICS, asked_for, documented, is_documented
from tests.support.metrics_house import MetricsHouse
from tests.support.prometheus import MONITORING, Prometheus, expressions, promtool
from tests.support.sidecar_engine import wait_until

RULES, CASES = MONITORING / "rules" / "aurora.yml", MONITORING / "rules" / "aurora_test.yml"
GRAFANA = MONITORING / "grafana"
BOARD = GRAFANA / "dashboards" / "aurora.json"
#: What Prometheus makes of itself.
PROMETHEUS = {"up", "ALERTS"}
#: What Grafana's schema leaves to the data source that an annotation asks.
OF_THE_DATA_SOURCE = {"step", "titleFormat", "textFormat", "tagKeys", "useValueForTime"}


@cache
def alerts() -> dict[str, dict[str, Any]]:
    rules = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


@cache
def board() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(BOARD.read_text())
    return loaded


@cache
def panels() -> list[dict[str, Any]]:
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def every_expression() -> list[tuple[str, str]]:
    """(where it stands, expression): of rules, panels, annotations and variables."""
    rules = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    return [
        *((rule.get("alert") or rule["record"], rule["expr"]) for rule in rules),
        *expressions(panels()),
        *((one["name"], one["expr"]) for one in marks()),
        *((one["name"], one["query"]["query"]) for one in variables()),
    ]


def marks() -> list[dict[str, Any]]:
    return [one for one in board()["annotations"]["list"] if not one.get("builtIn")]


def variables() -> list[dict[str, Any]]:
    return [one for one in board()["templating"]["list"] if one["type"] == "query"]


@cache
def series_of_sglang() -> set[str]:
    """As the installed SGLang's source names them, with what Prometheus's client adds."""
    found = importlib.util.find_spec("sglang")
    assert found is not None and found.submodule_search_locations
    files = Path(found.submodule_search_locations[0], "srt", "observability").glob("*.py")
    text = "".join(path.read_text() for path in files)
    names = set(re.findall(r'name="(sglang:\w+)"', text))
    assert len(names) > 100
    return names | {f"{name}{end}" for name in names for end in ("_bucket", "_sum", "_count")}


# -- with promtool ---------------------------------------------------------------------------------


def test_promtool_takes_the_configuration_its_targets_and_the_rules() -> None:
    code, text = promtool(
        "check", "config", "--lint=all", "--lint-fatal", MONITORING / "prometheus.yml"
    )
    assert (code, "1 rule files found" in text) == (0, True), text
    code, text = promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)
    assert code == 0, text


def test_promtool_sees_each_alert_fire_and_end_as_its_cases_say() -> None:
    code, text = promtool("test", "rules", CASES)
    assert code == 0, text


def test_each_alert_has_a_case_in_which_it_is_silent_fires_and_is_silent_again() -> None:
    seen: dict[str, set[str]] = {}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        course: dict[str, list[bool]] = {}
        for check in case["alert_rule_test"]:
            course.setdefault(check["alertname"], []).append(bool(check["exp_alerts"]))
        for name, fires in course.items():
            signs = {
                "silent": not fires[0],
                "fires": any(fires),
                "ends": any(before and not after for before, after in pairwise(fires)),
            }
            seen.setdefault(name, set()).update(sign for sign, shown in signs.items() if shown)
    assert seen == {name: {"silent", "fires", "ends"} for name in alerts()}


def test_each_alert_says_how_urgent_it_is_what_is_wrong_and_where_to_read_on() -> None:
    titles = re.findall(r"^### (\w+)$", METRICS.read_text(), re.MULTILINE)
    assert sorted(alerts()) == sorted(title for title in titles if title.startswith("Aurora"))
    for name, alert in alerts().items():
        assert alert["labels"] in ({"severity": "critical"}, {"severity": "warning"}), name
        assert sorted(alert["annotations"]) == ["description", "runbook_url", "summary"], name
        assert alert["annotations"]["runbook_url"] == f"docs/metrics.md#{name.lower()}"


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "expression"), every_expression(), ids=lambda one: str(one)[:40])
def test_every_series_that_rules_and_board_ask_for_exists_with_its_labels(
    where: str, expression: str
) -> None:
    """Ours as docs/metrics.md has them, which test_metrics.py compares with what is exposed."""
    named = asked_for(expression)
    assert named or any(name in expression for name in PROMETHEUS), where
    for name, labels in named:
        if name.startswith("sglang:"):
            assert name in series_of_sglang()
        else:
            assert is_documented(name, labels), (where, name, labels)


def test_the_board_shows_every_series_of_ours_or_the_docs_say_why_not() -> None:
    asked = {name for _, expression in every_expression() for name, _ in asked_for(expression)}
    left_out = {
        name for name in documented() if not {name, f"{name}_bucket", f"{name}_sum"} & asked
    }
    assert left_out == {
        "aurora_sidecar_accept_length",  # since the start: the board takes rates
        "aurora_sidecar_engine_capture_scale",
        "aurora_sidecar_engine_odd_records_total",  # a notice says it
        "aurora_sidecar_engine_queued_requests",  # SGLang's own are shown
        "aurora_sidecar_engine_running_requests",
        "aurora_sidecar_engine_unreadable_consents_total",
        "aurora_sidecar_engine_unstamped_requests_total",
        "aurora_sidecar_spool_damaged_bytes_total",  # the places are shown
        "aurora_sidecar_traces_open",
        "aurora_sidecar_tree_accept_length",
        "aurora_sidecar_tree_explored_total",
    }


# -- Grafana's files -------------------------------------------------------------------------------


def test_the_board_is_read_by_grafanas_own_schema_without_loss() -> None:
    """A field that the schema does not have is lost on the way through it."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(board())))
    lost = set(_lost(board(), read, ""))
    assert {path.rsplit(".", 1)[1] for path in lost} == OF_THE_DATA_SOURCE, lost
    assert all(path.startswith(".annotations.list[") for path in lost)


def _lost(one: Any, read: Any, path: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(read, dict):
        for name, value in one.items():
            if name in read:
                yield from _lost(value, read[name], f"{path}.{name}")
            elif value not in (None, [], {}):
                yield f"{path}.{name}"
    elif isinstance(one, list) and isinstance(read, list) and len(one) == len(read):
        for place, (value, other) in enumerate(zip(one, read, strict=True)):
            yield from _lost(value, other, f"{path}[{place}]")
    elif one != read:
        yield path


def test_each_panel_says_what_it_shows_in_which_unit_and_where_it_stands() -> None:
    numbers = Counter(panel["id"] for panel in board()["panels"])
    assert numbers.most_common(1)[0][1] == 1
    assert len({panel["title"] for panel in panels()}) == len(panels())
    for panel in panels():
        assert len(panel["description"].split()) > 3, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
    for one, other in combinations(board()["panels"], 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (one["title"], other["title"])
        assert a["x"] + a["w"] <= 24, one["title"]


def test_the_board_names_no_data_source_of_somebody_and_no_variable_that_it_has_not() -> None:
    text = BOARD.read_text()
    chosen = {one["name"] for one in board()["templating"]["list"]}
    assert chosen == {"datasource", "group", "server", "version", "domain"}
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__all"}
    assert used <= chosen | {"__rate_interval", "__range"}, used
    sources = set(re.findall(r'"type": "prometheus",\s*"uid": "([^"]*)"', text))
    assert sources == {"${datasource}"}
    assert board()["uid"] == "aurora-sgl"


def test_grafana_is_told_of_a_data_source_and_of_the_folder_of_the_board() -> None:
    (source,) = yaml.safe_load(
        (GRAFANA / "provisioning" / "datasources" / "aurora.yml").read_text()
    )["datasources"]
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
    configuration = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == configuration["global"]["scrape_interval"]
    (provider,) = yaml.safe_load(
        (GRAFANA / "provisioning" / "dashboards" / "aurora.yml").read_text()
    )["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


@pytest.mark.parametrize("name", ["targets.yml", "targets.compose.yml"])
def test_targets_have_the_ports_of_our_processes_and_the_labels_that_alerts_ask_for(
    name: str,
) -> None:
    entries = yaml.safe_load((MONITORING / name).read_text())
    ports = {entry["labels"]["job"]: urlsplit(f"//{entry['targets'][0]}").port for entry in entries}
    assert ports == {"sglang": 30000, "aurora-sidecar": 8520, "aurora-scheduler": 8510}
    assert all(entry["labels"]["group"] for entry in entries)


# -- a Prometheus that scrapes a loop --------------------------------------------------------------


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, upgraded_sqlite: Path
) -> Iterator[Prometheus]:
    """It has scraped a sidecar and a scheduler while requests came and a version was swapped in."""
    home, endpoint = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("e")
    shutil.copy(upgraded_sqlite, home / "aurora.db")
    house = MetricsHouse(home, endpoint)
    addresses = {
        "aurora-sidecar": urlsplit(house.sidecar_url).netloc,
        "aurora-scheduler": urlsplit(house.scheduler_url).netloc,
        "sglang": "127.0.0.1:1",  # nobody: SGLang's own series are not asked for here
    }
    running = Prometheus(tmp_path_factory.mktemp("prometheus"), addresses)
    scraped = (
        'count_over_time(aurora_sidecar_ready[1m]) > 3 and on () sum(up{job=~"aurora.*"}) == 2'
    )
    wait_until(lambda: running.values(scraped), 30, "both are scraped")
    house.lose(3)
    house.promote("b")
    house.keep_serving()
    yield running
    running.close()
    house.close()


def test_series_of_sglang_keep_the_names_that_sglang_gives_them(tmp_path: Path) -> None:
    """Its client library gives a Prometheus that asks for OpenMetrics others."""
    registry = CollectorRegistry()
    names = {"sglang:num_running_reqs", "sglang:gen_throughput"}
    for name in names:
        Gauge(name, "as SGLang has it", registry=registry).set(3)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    nobody = "127.0.0.1:1"
    addresses = {"aurora-sidecar": nobody, "aurora-scheduler": nobody,
                 "sglang": f"127.0.0.1:{server.server_port}"}  # fmt: skip
    running = Prometheus(tmp_path, addresses)
    try:
        theirs = '{job="sglang", __name__=~"sglang.*"}'
        rows = wait_until(lambda: running.values(theirs), 30, "SGLang's series")
    finally:
        running.close()
        server.shutdown()
        thread.join()
    assert {labels["__name__"] for labels, _ in rows} == names


def of_ours(expression: str) -> bool:
    return any(name.startswith("aurora_") for name, _ in asked_for(expression))


def test_no_panel_of_our_series_is_empty(prometheus: Prometheus) -> None:
    """Those of SGLang alone are asked for all the same, so that a slip in them shows."""
    every = expressions(panels())
    ours = [one for one in every if of_ours(one[1])]
    assert len(ours) > 80
    for _, expression in every:
        prometheus.values(expression)

    empty = ours

    def all_have_values() -> bool:
        nonlocal empty
        empty = [one for one in empty if not prometheus.values(one[1])]
        return not empty

    with suppress(AssertionError):
        wait_until(all_have_values, 20, "a value in every panel")
    assert empty == []
    of_others = {title for title, expression in every if not of_ours(expression)}
    assert of_others == {
        "Throughput", "Running requests", "Waiting requests", "Targets up", "As SGLang counts it",
        "Throughput and running requests", "Latency", "Alerts of Prometheus", "Targets",
    }  # fmt: skip


def test_every_rule_is_evaluated_without_an_error_and_what_is_wrong_fires(
    prometheus: Prometheus,
) -> None:
    rules = {
        rule["name"]: rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]
    }
    assert set(rules) > set(alerts())
    assert {
        name: rule.get("lastError") for name, rule in rules.items() if rule.get("lastError")
    } == {}
    assert {rule["health"] for rule in rules.values()} == {"ok"}
    firing = 'ALERTS{alertname="AuroraRecordsLost", alertstate="firing"}'
    ((labels, _),) = wait_until(lambda: prometheus.values(firing), 20, "the alert")
    assert (labels["place"], labels["group"], labels["server"]) == (
        "engine",
        "default",
        "127.0.0.1",
    )
    pending = {labels["alertname"] for labels, _ in prometheus.values("ALERTS")}
    assert {"AuroraTargetDown", "AuroraTrainingFails"} <= pending


def test_the_boards_variables_have_what_there_is_to_choose(prometheus: Prometheus) -> None:
    for variable in variables():
        query, label = re.fullmatch(
            r"label_values\((.+), (\w+)\)", variable["query"]["query"]
        ).groups()  # type: ignore[union-attr]
        assert label == variable["name"]
        assert {labels.get(label) for labels, _ in prometheus.values(query)} - {None}, label


def test_a_version_that_goes_live_is_a_mark_with_its_number(prometheus: Prometheus) -> None:
    promotions, rollbacks = marks()
    assert re.findall(r"\{\{(\w+)\}\}", promotions["titleFormat"]) == ["version"]
    shown = wait_until(lambda: prometheus.course(promotions["expr"]), 30, "the mark")
    assert {labels["version"] for labels in shown} == {"2"}
    assert prometheus.course(rollbacks["expr"]) == []
