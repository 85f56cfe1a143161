"""What a sidecar is told by the server that starts it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from aurora_sgl.config import Settings
from aurora_sgl.sidecar.supervisor import as_variables


def other(value: Any) -> Any:
    """A value of the same kind; the same where one can't be known."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2
    return value * 2 if isinstance(value, int) else value


def read(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Settings:
    for name in [name for name in os.environ if name.startswith("AURORA_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Settings()


@pytest.mark.parametrize("name", ["", *Settings.model_fields])
def test_every_setting_is_read_by_the_sidecar_as_it_is(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The defaults, and each setting with another value; what is nothing stays nothing."""
    before = read(monkeypatch, {})
    default = getattr(before, name) if name else None
    if name.startswith("price_") and default is None:
        default = 2.25
    changed = Settings(**{name: other(default)}) if name else before
    assert read(monkeypatch, as_variables(changed)).model_dump() == changed.model_dump()


def test_the_port_of_health_is_told_only_where_somebody_chose_it() -> None:
    assert "AURORA_HEALTH_PORT" not in as_variables(Settings())
    assert as_variables(Settings(health_port=0))["AURORA_HEALTH_PORT"] == "0"
