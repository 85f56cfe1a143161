"""One server in which nearly everything of ours is wrong at the start: it answers, records what it
can, and says what is off."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from aurora_sgl import store
from aurora_sgl.config import Settings
from aurora_sgl.processes.server import ServerProcess, free_port
from aurora_sgl.rollout import status
from aurora_sgl.serving import plan
from tests.e2e.conftest import Running
from tests.support.sidecar_engine import wait_until as until

#: Sockets have names of 107 bytes: SGLang's own, 12 longer than this, still fit, ours don't.
LONG = 88


@dataclass
class House:
    server: Running
    unwritable: Path

    @property
    def log(self) -> str:
        return self.server.process.log.read_text(errors="replace")

    def lines(self, words: str) -> list[str]:
        return [line for line in self.log.splitlines() if words in line]

    def ask(self, statement: str) -> int:
        try:
            with store.reading(self.server.engine) as connection:
                return int(connection.scalar(text(statement)) or 0)
        except Exception:  # no table yet
            return 0

    def notices(self) -> str:
        servers = status.servers(self.server.engine, "default")
        return "\n".join(servers[0].notices) if servers else ""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[House]:
    base = tmp_path_factory.mktemp("startup")
    (base / "file").write_text("")
    unwritable = base / "file" / "home"
    short = Path(tempfile.mkdtemp(prefix="aurora-test-", dir="/tmp"))
    long = short / ("t" * (LONG - len(str(short)) - 1))
    long.mkdir()
    url = f"sqlite:///{base / 'elsewhere.db'}"
    flags = ["--dtype", "float32", "--max-running-requests", "8", "--max-total-tokens", "4096"]
    ready = plan(str(model), "scratch", flags, Settings(home=base / "home", database_url=url))
    process = ServerProcess(
        ready.flags,
        port=free_port(),
        log=base / "server.log",
        environment={
            **ready.environment,
            "OMP_NUM_THREADS": "1",
            "AURORA_EXIT_WITH_PARENT": "1",
            "AURORA_HOME": str(unwritable),
            "AURORA_DATABASE_URL": url,
            "AURORA_CAPTURE_SHARE": "lots",
            "AURORA_SPECULATION": "sometimes",
            "TMPDIR": str(long),
        },
    )
    engine: Engine = store.connect(url)
    process.start()
    try:
        process.wait_ready(480)
        yield House(Running(process, base, engine, 0, 0), unwritable)
    finally:
        process.stop()
        engine.dispose()
        shutil.rmtree(short, ignore_errors=True)


def test_it_answers_and_records(house: House) -> None:
    """Its drafter can't be stored, and nothing waits for it."""
    for _ in range(3):
        answer = house.server.generate([1, 2, 3, 4, 5], max_new_tokens=8)
        assert len(answer["output_ids"]) == 8
    until(lambda: house.ask("SELECT count(*) FROM acceptance_event"), 60, "events")
    until(lambda: house.ask("SELECT count(*) FROM request WHERE status = 'finished'") == 3, 30)
    assert house.ask("SELECT count(*) FROM drafter_version") == 0
    assert house.ask("SELECT count(*) FROM trace") == 0


def test_its_log_says_in_a_line_each_what_is_off(house: House) -> None:
    (share,) = house.lines("AURORA_CAPTURE_SHARE")[:1]
    assert "'lots'" in share and "the default 1.0 is used" in share
    assert "the default 'auto' is used" in house.lines("AURORA_SPECULATION")[0]
    (summary,) = house.lines("aurora-sgl: verify steps are recorded")
    assert "hidden states are not traced, no version goes live" in summary
    assert f"AURORA_HOME {house.unwritable} can't be written" in summary
    assert "Traceback" not in house.log


def test_its_notices_reach_status_and_page(house: House) -> None:
    until(lambda: "drafter of this server is unknown" in house.notices(), 60, "the notices")
    notices = house.notices()
    assert "AURORA_CAPTURE_SHARE" in notices
    assert f"AURORA_HOME {house.unwritable} can't be written" in notices
    assert "artifact root" in notices
