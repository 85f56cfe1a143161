"""Case "AURORA_HOME='~/x'": the home folder, in every setting that is a path, wherever it is read
from. A shell makes it so in few places: not in quotes, not in an ``.env`` file, not in a URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from aurora_sgl import cli
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import SchedulerSettings, Settings, from_home, read_forgiving
from aurora_sgl.drafter import hub
from aurora_sgl.store.connection import parse_url


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("AURORA_HOME", "AURORA_ARTIFACTS", "AURORA_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("source", ["environment", ".env", "argument", "path"])
def test_every_path_of_the_settings_may_begin_with_the_home_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    values = {"home": "~/x", "artifacts": "~/files", "database_url": "sqlite:///~/x/aurora.db"}
    if source == "environment":
        for name, value in values.items():
            monkeypatch.setenv(f"AURORA_{name.upper()}", value)
        settings = Settings()
    elif source == ".env":
        lines = [f"AURORA_{name.upper()}={value}\n" for name, value in values.items()]
        (home / ".env").write_text("".join(lines))
        settings = Settings()
    elif source == "argument":
        settings = Settings(**values)  # type: ignore[arg-type]
    else:
        settings = Settings(**values | {"home": Path("~/x")})  # type: ignore[arg-type]
    assert settings.home == home / "x"
    assert settings.artifact_root == str(home / "files")
    assert parse_url(settings.store_url).database == str(home / "x" / "aurora.db")
    root = ArtifactRoot(settings.artifact_root)
    assert root.local_path("versions/1") == home / "files" / "versions" / "1"
    assert not (home / "~").exists()


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("~", "{}"),
        ("~/x", "{}/x"),
        ("sqlite:///~/a.db", "sqlite:///{}/a.db"),
        ("sqlite+pysqlite:///~/a.db", "sqlite+pysqlite:///{}/a.db"),
        ("file://~/x", "file://{}/x"),
        ("file:///~/x", "file://{}/x"),
        ("s3://~/x", "s3://~/x"),
        ("./~/x", "./~/x"),
        ("/data/~x", "/data/~x"),
        ("postgresql://u:~/p@h/d", "postgresql://u:~/p@h/d"),
        ("", ""),
    ],
)
def test_only_a_path_is_taken_for_one(home: Path, given: str, place: str) -> None:
    assert from_home(given) == place.format(home)


def test_the_home_of_nobody_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="no user's home folder"):
        Settings(home="~no-such-user-here/x")  # type: ignore[arg-type]
    monkeypatch.setenv("AURORA_HOME", "~no-such-user-here/x")
    settings, (line,) = read_forgiving()
    assert settings.home == Path("aurora-data") and "AURORA_HOME" in line and "\n" not in line


def test_a_folder_of_a_model_or_a_drafter_too(home: Path) -> None:
    assert hub.local("~/model") == hub.fetch("~/model", "model") == home / "model"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"AURORA_SCHEDULER_RECIPE=[1\n", "a setting can't be read"),
        (b"AURORA_GROUP=\xff\xfe\n", "UTF-8"),
        (b"AURORA_HOME=~no-such-user-here/x\n", "setting AURORA_HOME"),
    ],
)
def test_settings_that_no_class_can_read_end_a_command_with_one_line(
    home: Path, file: bytes, words: str
) -> None:
    (home / ".env").write_bytes(file)
    with pytest.raises(Exception) as caught:
        Settings(), SchedulerSettings()
    line = cli._one_line(caught.value)
    assert line is not None and words in line and "\n" not in line
