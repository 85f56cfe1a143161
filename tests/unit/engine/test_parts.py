"""What fails of ours is tried again, told, and stops nothing else."""

from __future__ import annotations

import logging

import pytest

from aurora_sgl.engine.parts import FIRST_PAUSE, LONGEST_PAUSE, NOTICE_SECONDS, Parts

NAME = "recording results"


class House:
    """Parts with a clock that a test moves, and work that fails as long as it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.notices: dict[str, str] = {}
        self.parts = Parts(self.notices, lambda: self.now)
        self.error: Exception | None = None
        self.tries = 0

    def attempt(self, name: str = NAME, *, always: bool = False) -> str:
        return self.parts.attempt(name, self._work, "left", always=always)

    def _work(self) -> str:
        self.tries += 1
        if self.error is not None:
            raise self.error
        return "done"

    def seconds_until_the_next_try(self) -> float:
        begun, tries = self.now, self.tries
        while self.tries == tries:
            self.now += 0.5
            assert self.attempt() == "left"
        return self.now - begun


@pytest.fixture
def house() -> House:
    return House()


def test_a_part_that_fails_is_tried_again_after_pauses_that_double_up_to_a_bound(
    house: House,
) -> None:
    house.error = ValueError("odd")
    assert house.attempt() == "left"
    pauses = [house.seconds_until_the_next_try() for _ in range(11)]
    assert pauses[:4] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE]
    assert pauses[-1] == pauses[-2] == LONGEST_PAUSE
    assert house.parts.failures == house.tries == 12


def test_a_part_that_works_again_is_as_before(house: House) -> None:
    house.error = ValueError("odd")
    house.attempt()
    house.seconds_until_the_next_try()
    house.error = None
    house.now += LONGEST_PAUSE
    assert house.attempt() == house.attempt() == "done"
    assert house.parts.down == 0
    house.error = ValueError("odd again")
    house.attempt()
    assert house.seconds_until_the_next_try() == FIRST_PAUSE


@pytest.mark.parametrize(
    "error", [ValueError("odd"), UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "no"), KeyError("x")]
)
def test_a_part_that_fails_leaves_the_others_alone(house: House, error: Exception) -> None:
    house.error = error
    house.attempt("saying hello")
    house.error = None
    assert house.attempt("swapping") == "done"
    assert house.parts.down == 1


def test_a_part_that_others_wait_for_is_never_left_alone(house: House) -> None:
    house.error = ValueError("odd")
    for _ in range(5):
        assert house.attempt(always=True) == "left"
    assert house.tries == 5
    house.error = None
    assert house.attempt(always=True) == "done"


def test_the_heartbeat_says_what_failed_and_how_often_until_it_has_gone_well_for_a_while(
    house: House,
) -> None:
    house.error = ValueError("half an emoji: \ud83d\x00")
    house.attempt()
    house.seconds_until_the_next_try()
    said = house.notices[f"failed: {NAME}"]
    assert "Recording results failed 2 times" in said and "half an emoji" in said
    assert said.isprintable()
    house.error = None
    house.now += LONGEST_PAUSE
    house.parts.forget_old()
    assert house.notices  # it was not tried since
    house.attempt()
    house.parts.forget_old()
    assert not house.notices
    house.error = ValueError("odd")
    house.attempt()
    house.error = None
    house.now += FIRST_PAUSE
    house.attempt()
    house.parts.forget_old()
    assert house.notices  # so that somebody sees it
    house.now += NOTICE_SECONDS
    house.parts.forget_old()
    assert not house.notices


def test_one_kind_of_error_is_logged_once_with_its_place_and_then_rarely(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "aurora_sgl")
    for _ in range(200):
        house.parts.failed(NAME, ValueError("odd"))
        house.now += 0.1
    house.parts.failed(NAME, KeyError("another kind"))
    told = [record.getMessage() for record in caplog.records]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "ValueError: odd" in told[0] and "KeyError: 'another kind'" in told[1]
    house.now += 1000.0
    house.parts.failed(NAME, ValueError("odd"))
    assert "failed 200 more times" in caplog.records[-1].getMessage()
    assert "\n" not in caplog.records[-1].getMessage()


def test_what_is_logged_of_a_failure_is_text_that_every_log_takes(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.parts.failed(NAME, ValueError("half an emoji: \ud83d"))
    assert b"half an emoji: \\ud83d" in caplog.records[-1].getMessage().encode()
