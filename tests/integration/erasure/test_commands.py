"""``aurora-sgl db purge``, ``db backup`` and ``db restore`` as people type them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import get_settings
from tests.integration.erasure.conftest import Run
from tests.support.purge_house import DOMAIN, OTHERS, RID, PurgeHouse


@pytest.fixture
def house(
    tmp_path: Path, upgraded_sqlite: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PurgeHouse]:
    from aurora_sgl import store

    home = tmp_path / "home"
    home.mkdir()
    (home / "aurora.db").write_bytes(upgraded_sqlite.read_bytes())
    monkeypatch.setenv("AURORA_HOME", str(home))
    monkeypatch.delenv("AURORA_DATABASE_URL", raising=False)
    get_settings.cache_clear()
    engine: Engine = store.connect()
    one = PurgeHouse(home, engine, ArtifactRoot())
    one.fill()
    one.close_sidecar()
    yield one
    engine.dispose()
    get_settings.cache_clear()


def test_a_look_says_what_would_go_and_changes_nothing(house: PurgeHouse, run: Run) -> None:
    code, out, err = run("db", "purge", "--rid", RID, "--dry-run", "--json")
    report = json.loads(out)
    assert (code, err, report["dry_run"], report["requests"]) == (0, "", True, 2)
    assert report["versions_that_learnt"] == [house.learnt]
    code, out, _ = run("db", "purge", "--rid", RID, "--dry-run")
    assert code == 0 and "versions that learnt" in out
    assert house.numbers("request", "id") == [1, 2, 3, 4]


def test_a_purge_by_hand(house: PurgeHouse, run: Run) -> None:
    code, out, err = run(
        "db", "purge", "--domain", DOMAIN, "--reason", "ticket 4711", "--yes", "--json"
    )
    report = json.loads(out)
    assert (code, err, report["left"]) == (0, "", [])
    assert (report["requests"], report["versions_made_from_those"]) == (2, [house.derived])
    assert house.numbers("request", "id") == list(OTHERS)
    assert house.leftovers() == set()


WRONG: tuple[tuple[tuple[str, ...], str], ...] = (
    ((), "say one of --request"),
    (("--rid", "a", "--domain", "b"), "say one of --request"),
    (("--before", "yesterday"), "is no date or time"),
    (("--rid", "a"), "a purge needs a reason"),
    (("--rid", "a", "--reason", "b"), "add --yes"),
    (("--request", "x", "--yes"), "a valid integer"),
)


def test_wrong_use_and_what_is_refused_say_why_and_change_nothing(
    house: PurgeHouse, run: Run, tmp_path: Path
) -> None:
    for arguments, message in WRONG:
        code, out, err = run("db", "purge", *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in " ".join(err.replace("│", " ").split()), err
    for refused in (
        ("db", "purge", "--before", "2999-01-01", "--reason", "b", "--yes"),
        ("db", "purge", "--rid", "", "--reason", "b", "--yes"),
        ("db", "restore", str(tmp_path / "nothing")),
        ("db", "backup", str(house.home)),
    ):
        code, out, err = run(*refused)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith("aurora-sgl: ")
    assert house.numbers("request", "id") == [1, 2, 3, 4]


def test_a_backup_and_its_restore_by_hand(house: PurgeHouse, run: Run, tmp_path: Path) -> None:
    code, out, err = run("db", "backup", str(tmp_path / "backup"), "--json")
    report = json.loads(out)
    assert code == 1 and "the weights of versions [1, 2, 3, 4, 5, 6] are missing" in err
    assert report["traces"] == 4
    code, _, err = run("db", "restore", str(tmp_path / "backup"))
    assert code == 1 and "the store is not empty" in err
    (house.home / "aurora.db").unlink()
    (house.home / "aurora.db-wal").unlink(missing_ok=True)
    house.engine.dispose()
    code, out, err = run("db", "restore", str(tmp_path / "backup"), "--json")
    assert (code, err, json.loads(out)["database"]) == (0, "", "sqlite")
    assert house.numbers("request", "id") == [1, 2, 3, 4]
