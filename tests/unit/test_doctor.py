"""What doctor finds on this machine, and what it says when something is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aurora_sgl import cli, doctor, store, wire
from aurora_sgl.config import Settings, get_settings
from aurora_sgl.store import queries


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", database_url="")


def found(settings: Settings) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(settings)}


def test_an_environment_made_by_setup_lacks_nothing(settings: Settings) -> None:
    findings = found(settings)
    assert {f.name: f.found for f in findings.values() if f.state == "missing"} == {}
    for name in ("Python", "PyTorch", "CUDA", "SGLang", "plugin", "store", "disk", "demo model"):
        assert name in findings
    assert not settings.home.exists(), "doctor changes nothing"


@pytest.mark.parametrize(
    ("release", "state", "says"),
    [
        (doctor.SGLANG_TESTED, "ok", "the tested release"),
        *((r, "ok", "run on CPU") for r in doctor.SGLANG_RUN if r != doctor.SGLANG_TESTED),
        ("0.5.22.post1", "note", "never run"),
        ("0.5.23.post2", "note", "never run"),
    ],
)
def test_a_supported_sglang_says_whether_it_was_run(release: str, state: str, says: str) -> None:
    assert doctor.is_supported(release)
    finding = doctor.sglang_finding(release)
    assert finding.state == state and finding.found.startswith(release) and says in finding.found
    assert bool(finding.advice) == (state != "ok")


def test_a_store_that_was_not_upgraded_is_missing_and_says_how_to_mend_it(
    settings: Settings,
) -> None:
    engine = store.connect(settings.store_url)
    assert found(settings)["store"].state == "missing"
    assert "db upgrade" in found(settings)["store"].advice
    store.upgrade(engine)
    assert found(settings)["store"].state == "ok"


def test_a_store_that_cannot_be_reached_is_named_without_its_password() -> None:
    url = "postgresql://someone:secret@127.0.0.1:1/nothing"
    finding = found(Settings(database_url=url))["store"]
    assert finding.state == "missing"
    assert "127.0.0.1:1" in finding.found and "secret" not in finding.found


def test_what_is_missing_is_advised_in_every_finding(settings: Settings) -> None:
    assert all(f.advice for f in doctor.examine(settings) if f.state != "ok")


def test_the_command_prints_json_and_exits_with_1_when_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AURORA_HOME", str(tmp_path))
    monkeypatch.setenv("AURORA_DATABASE_URL", "postgresql://a:b@127.0.0.1:1/x")
    monkeypatch.setattr(sys, "argv", ["aurora-sgl", "doctor", "--json"])
    monkeypatch.setattr(cli, "keep_to_owner", lambda: None)  # of a process, and this is pytest's
    get_settings.cache_clear()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    get_settings.cache_clear()
    rows = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1
    assert [row["name"] for row in rows if row["state"] == "missing"] == ["store"]


@pytest.mark.parametrize(
    ("release", "supported"),
    [("0.5.21", True), ("0.5.21.post1", True), ("0.5.23", True), ("0.5.16", False), ("1", False)],
)
def test_releases_of_sglang_are_supported_by_number(release: str, supported: bool) -> None:
    assert doctor.is_supported(release) is supported


def test_what_the_budgets_of_traces_hold_is_told_for_the_target_that_was_served(
    settings: Settings,
) -> None:
    engine = store.connect(settings.store_url)
    store.upgrade(engine)
    assert "traces" not in found(settings), "nothing was served yet"
    counters = {
        "trace_row_bytes": 65536.0, "trace_budget_disk": 2.0 * 1024**3,
        "trace_budget_unfinished": 512.0 * 1024**2, "trace_budget_second": 64.0 * 1024**2,
    }  # fmt: skip
    hello = wire.Hello(5, 1, {"name": "a"}, 0, 0, 0, counters)
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "g", "t", "", "d")
        queries.servers.register_server(s, group.id, hello)
    finding = found(settings)["traces"]
    assert finding.state == "ok" and "the files hold 32,768 tokens" in finding.found
    engine.dispose()


def test_a_look_that_may_not_name_its_file_is_one_line_too() -> None:
    """The system's refusals do not all say of what."""

    def refused() -> Iterator[doctor.Finding]:
        yield doctor.Finding("first", "ok", "")
        raise PermissionError(13, "Permission denied")

    first, second = doctor._tried(refused)
    assert (first.name, second.state, second.found) == ("first", "missing", "Permission denied")
