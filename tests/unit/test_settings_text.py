"""Settings are text: what an environment has as bytes that are none is refused in one line."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from aurora_sgl import config

HALVES = ("\ud83d", "\udcff", "plain \udc00 text")
CLASSES = [
    config.Settings, config.GateSettings, config.WatchSettings, config.TrialSettings,
    config.SchedulerSettings,
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
