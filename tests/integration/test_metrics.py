"""What the readers of ``/metrics`` see of a sidecar and a scheduler that know what is secret."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine as Store

from aurora_sgl import rollout, store, wire
from aurora_sgl.store import queries
from tests.support import store_samples as samples
from tests.support.sidecar_engine import Engine, Sidecar, wait_until

BOOT = 77
DOMAIN, CODE = "a domain of the client's", "failed: capture"
#: Whatever may not be in the metrics has this in it. Tokens are numbers of their own.
MARK, TOKEN = "kept from readers", 48_611_077
#: Of every label the values that it may have: closed lists, but for versions and domains.
LABELS = {
    "version", "domain", "place", "code", "status", "kind", "verdict", "state", "action",
}  # fmt: skip


@pytest.fixture(scope="module")
def read(
    tmp_path_factory: pytest.TempPathFactory, upgraded_sqlite: Path
) -> Iterator[dict[str, tuple[str, str]]]:
    """By process: the address of its metrics, and what they say."""
    home, endpoint = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("e")
    shutil.copy(upgraded_sqlite, home / "aurora.db")
    with ExitStack() as stack:
        sidecar = Sidecar(home, endpoint, health_port=0)
        stack.callback(sidecar.stop)
        engine = Engine(endpoint, BOOT, name=f"server {MARK}", target_model=f"target {MARK}")
        stack.callback(engine.close)
        engine.notices = {CODE: f"a line, {MARK}"}
        serve(engine)
        engine.run()
        sidecar.wait_ready()
        for what in (f'domain="{DOMAIN}"', "sidecar_notice{"):
            wait_until(lambda: what in sidecar.get("/metrics")[1], 60, what)  # noqa: B023
        fill(f"sqlite:///{home / 'aurora.db'}")
        log = home / "scheduler.log"
        scheduler = subprocess.Popen(
            [sys.executable, "-m", "aurora_sgl.cli", "scheduler"],
            env={**{k: v for k, v in os.environ.items() if not k.startswith("AURORA_")},
                 "AURORA_HOME": str(home), "AURORA_SCHEDULER_PORT": "0"},
            stdout=log.open("wb"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        stack.callback(scheduler.wait, 30)
        stack.callback(scheduler.terminate)
        said = wait_until(lambda: address_in(log), 60, "the scheduler's address")
        text = wait_until(lambda: group_in(said), 60, "the group's metrics")
        sidecar_said = address_in(sidecar.log)
        yield {
            "sidecar": (sidecar_said, sidecar.get("/metrics")[1]),
            "scheduler": (said, text),
        }


def serve(engine: Engine) -> None:
    """Three requests of a client, whose every text has the mark."""
    now, tokens = wire.now_us(), [TOKEN, TOKEN + 1, TOKEN + 2]
    for number in (1, 2, 3):
        start = samples.started(number, domain=DOMAIN, at_us=now, boot_id=BOOT)
        step = samples.chain_step(number, 0, 2, at_us=now + 1000, boot_id=BOOT)
        engine.send(
            msgspec.structs.replace(start, rid=f"rid {MARK}", conversation_hash=f"c {MARK}",
                                    sampling={"stop": MARK}),
            msgspec.structs.replace(step, draft_tokens=tokens, target_tokens=[*tokens, TOKEN]),
            samples.finished(number, [step], at_us=now + 2000, boot_id=BOOT),
        )  # fmt: skip


def fill(url: str) -> None:
    """What operators and runs write has it too, once the store has the requests."""
    engine = store.connect(url)
    try:
        wait_until(lambda: stored(engine) == 3, 30, "the requests in the store")
        with store.session(engine) as s:
            (group,) = queries.groups.groups(s)
            version = samples.add_version(s, group.id, "a", note=MARK,
                                          target_model=group.target_model)  # fmt: skip
            run = queries.runs.start_run(s, group.id, trigger="drift", base_version_id=version)
            queries.runs.finish_run(s, run.id, "failed", error=f"no {MARK}")
            (server,) = queries.servers.servers(s, group.id)
            queries.servers.touch_server(s, server.id, last_error=f"error {MARK}")
            queries.drops.add_drops(s, server.id, "engine", 2)
        rollout.promote(engine, version, actor=f"ada {MARK}", reason=f"because {MARK}", force=True)
    finally:
        engine.dispose()


def stored(engine: Store) -> int:
    with store.reading(engine) as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM request").scalar_one())


def address_in(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if "health and metrics at" in line]
    return lines[0].split()[-1] if lines else ""


def group_in(url: str) -> str:
    text = httpx.get(f"{url}/metrics", timeout=5).text
    return text if f'domain="{DOMAIN}"' in text and "aurora_live_version 1.0" in text else ""


def parsed(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


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
    assert all(value.isdigit() for name, value in labels if name == "version")
    assert all(one.name.startswith("aurora_") for one in every)


@PROCESSES
def test_metrics_are_on_loopback_unless_somebody_chose_otherwise(
    read: dict[str, tuple[str, str]], process: str
) -> None:
    url, _ = read[process]
    assert urlsplit(url).hostname == "127.0.0.1"
    answer = httpx.get(f"{url}/metrics", headers={"Host": "evil.example"}, timeout=5)
    assert (answer.status_code, DOMAIN in answer.text) == (403, False)
