"""What a user is told is one line, whatever it quotes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from aurora_sgl.errors import AuroraError, Refused, Unusable
from aurora_sgl.store.faults import BadRecord


@pytest.mark.parametrize("kind", [AuroraError, Refused, Unusable, BadRecord])
@given(quoted=some.text(some.characters(), max_size=40))
def test_an_error_is_one_line_that_every_file_and_store_takes(
    kind: type[Exception], quoted: str
) -> None:
    line = str(kind(f"config.json: {quoted!s} is no number"))
    assert len(line.splitlines()) == 1
    line.encode()
    assert "\x00" not in line and "\x1b" not in line
    assert line.startswith("config.json: ") and line.endswith(" is no number")


def test_a_plain_one_stays_as_it_is() -> None:
    assert str(AuroraError("a  b: \u5ba2\u670d")) == "a  b: \u5ba2\u670d"
