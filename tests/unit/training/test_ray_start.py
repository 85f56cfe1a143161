"""Ray gives its processes half a minute to start; on a busy machine that takes another try."""

from __future__ import annotations

import pytest

from aurora_sgl.errors import AuroraError
from aurora_sgl.training import scale


class SlowRay:
    """Starts at the try with this number."""

    def __init__(self, starts_at: int, error: str) -> None:
        self.starts_at, self.error = starts_at, error
        self.tries = self.shutdowns = 0

    def init(self, **options: object) -> None:
        self.tries += 1
        if self.tries < self.starts_at:
            raise Exception(self.error)

    def shutdown(self) -> None:
        self.shutdowns += 1


SLOW = "The current node timed out during startup. This could happen because some of the raylet ..."


@pytest.mark.parametrize("at", [1, 2, scale.STARTS])
def test_a_slow_start_is_tried_again(at: int) -> None:
    ray = SlowRay(at, SLOW)
    scale._start(ray, 2)
    assert (ray.tries, ray.shutdowns) == (at, at - 1)


@pytest.mark.parametrize(("error", "tries"), [(SLOW, scale.STARTS), ("no such cluster", 1)])
def test_what_no_other_try_helps_is_one_line(error: str, tries: int) -> None:
    ray = SlowRay(99, error)
    with pytest.raises(AuroraError, match="Ray does not start: ") as caught:
        scale._start(ray, 2)
    assert ray.tries == tries and "\n" not in str(caught.value)
