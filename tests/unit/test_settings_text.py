"""Settings are text: what an environment has as bytes that are none is refused in one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from aurora_sgl import config

HALVES = ("\ud83d", "\udcff", "plain \udc00 text")
CLASSES = [
    config.Settings, config.GateSettings, config.WatchSettings, config.TrialSettings,
    config.SchedulerSettings, config.NotifySettings,
]  # fmt: skip
TEXTS = [
    (one, name)
    for one in CLASSES
    for name, field in one.model_fields.items()
    if field.annotation not in (bool, int, float)
]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("one, name", TEXTS, ids=lambda value: getattr(value, "__name__", value))
def test_half_a_character_is_no_setting(one: type[BaseSettings], name: str, half: str) -> None:
    with pytest.raises(ValidationError):
        one(**{name: half})


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("where", ["{{{0}: 1}}", '{{"a": {0}}}', '{{"a": [1, {{"b": {0}}}]}}'])
def test_nor_deep_in_a_recipe(monkeypatch: pytest.MonkeyPatch, half: str, where: str) -> None:
    escaped = '"' + "".join(f"\\u{ord(letter):04x}" for letter in half) + '"'
    monkeypatch.setenv("AURORA_SCHEDULER_RECIPE", where.format(escaped))
    with pytest.raises(ValidationError, match="UTF-8 text"):
        config.SchedulerSettings()


def test_whole_characters_are() -> None:
    config.SchedulerSettings(recipe={"\U0001f600": ["\u5ba2"]}).model_dump_json()


@pytest.mark.parametrize("variable", ["AURORA_SECRETS", "CREDENTIALS_DIRECTORY"])
def test_a_file_named_after_a_setting_holds_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name, text in {
        "aurora_database_url": "postgresql+psycopg://aurora:pass@db/aurora\n",
        "aurora_scheduler_api_token": "0123456789abcdef\n",
        "aurora_notify_slack": "https://hooks.example/x",
        "AURORA_GATE_REQUESTS": "40",
        "of_somebody_else": "x",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv(variable, str(tmp_path))
    assert config.Settings().store_url == "postgresql+psycopg://aurora:pass@db/aurora"
    assert config.SchedulerSettings().api_token.get_secret_value() == "0123456789abcdef"
    notify = config.NotifySettings()
    assert notify.slack.get_secret_value() == "https://hooks.example/x"
    assert "hooks.example" not in repr(notify) + str(notify.model_dump())
    assert config.GateSettings().requests == 40
    monkeypatch.setenv("AURORA_DATABASE_URL", "sqlite:///of-the-environment.db")
    assert config.Settings().store_url == "sqlite:///of-the-environment.db"


def test_a_folder_of_secrets_that_is_not_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AURORA_SECRETS", str(tmp_path / "nowhere"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.Settings().group == "default"
