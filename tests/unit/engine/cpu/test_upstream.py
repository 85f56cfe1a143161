"""Our compiled ways beside SGLang's own: what SGLang may change, and what then happens."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_sgl.engine.cpu import sampling, upstream
from aurora_sgl.engine.cpu.upstream import Beside


class Layer:
    """Stands where SGLang's module does: ``scale`` is what our way reads of it."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def ours(layer: Layer, x: int, residual: int | None = None) -> Any:
    return None if x < 0 else ("ours", layer.scale * x, residual)


class AsKnown(Layer):
    def forward(self, x: int, residual: int | None = None) -> Any:
        return ("SGLang's", x, residual)


class Grown(Layer):
    def forward(self, x: int, residual: int | None = None, capture: Any = None) -> Any:
        return ("SGLang's", x, residual, capture)


class Moved(Layer):
    def forward(self, x: int, capture: Any = None, residual: int | None = None) -> Any:
        return ("SGLang's", x, residual, capture)


class Renamed(Layer):
    def forward(self, hidden: int, residual: int | None = None) -> Any:
        return ("SGLang's", hidden, residual)


class Shrunk(Layer):
    def forward(self, x: int) -> Any:
        return ("SGLang's", x)


@pytest.fixture(autouse=True)
def notices(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    told: dict[str, str] = {}
    monkeypatch.setattr(upstream, "_notices", told)
    return told


def test_a_call_that_ours_covers_is_ours_by_place_and_by_name(notices: dict[str, str]) -> None:
    hook, layer = Beside(ours), AsKnown(scale=2)
    assert hook(AsKnown.forward, layer, 3) == ("ours", 6, None)
    assert hook(AsKnown.forward, layer, x=3, residual=4) == ("ours", 6, 4)
    assert hook(AsKnown.forward, layer, -1, residual=4) == ("SGLang's", -1, 4)  # not covered
    assert hook(AsKnown.forward, layer, 3) == ("ours", 6, None) and notices == {}


def test_an_argument_that_ours_does_not_know_goes_to_sglang_with_its_call() -> None:
    hook, layer = Beside(ours), Grown(scale=2)
    assert hook(Grown.forward, layer, 3) == ("ours", 6, None)
    assert hook(Grown.forward, layer, 3, capture="c") == ("SGLang's", 3, None, "c")
    assert hook(Grown.forward, layer, 3, 4, "c") == ("SGLang's", 3, 4, "c")
    assert hook(Grown.forward, layer, 3) == ("ours", 6, None)


@pytest.mark.parametrize("kind", [Moved, Renamed, Shrunk])
def test_another_signature_is_left_to_sglang_and_said_once(
    kind: Any, notices: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    hook, layer = Beside(ours), kind(scale=2)
    with caplog.at_level(logging.INFO):
        assert [hook(kind.forward, layer, 3)[:2] for _ in range(3)] == [("SGLang's", 3)] * 3
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    (code, said), *more = notices.items()
    assert not more and code == f"not compiled: {kind.__name__}.forward"
    assert "slower" in said and said.endswith(".")


def test_where_another_hook_does_the_work_nobody_is_told(
    notices: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    hook = Beside(ours, spare=True)
    with caplog.at_level(logging.INFO):
        assert hook(Moved.forward, Moved(scale=2), 3) == ("SGLang's", 3, None, None)
    assert notices == {} and [r.levelno for r in caplog.records] == [logging.INFO]


@pytest.mark.parametrize("fields", [{}, {"scale": SimpleNamespace()}], ids=["absent", "other kind"])
def test_a_module_of_another_make_is_left_to_sglang_and_told(
    fields: dict[str, Any], notices: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    hook = Beside(ours)
    for _ in range(3):
        assert hook(AsKnown.forward, AsKnown(**fields), 3, residual=4) == ("SGLang's", 3, 4)
    assert list(notices) == ["not compiled: AsKnown.forward"] and len(caplog.records) == 1
    later: dict[str, str] = {"other": "Something else."}
    upstream.tell(later)  # the agent comes after the first forward
    assert later.keys() == {"other", *notices}


def test_a_call_at_fault_fails_as_sglangs_own_does_and_turns_nothing_off(
    notices: dict[str, str],
) -> None:
    def reads(layer: Layer, x: int) -> Any:
        return [10, 20][x]

    class Reading(Layer):
        def forward(self, x: int) -> Any:
            return [1, 2][x]

    hook = Beside(reads)
    assert hook(Reading.forward, Reading(), 1) == 20
    with pytest.raises(IndexError):
        hook(Reading.forward, Reading(), 5)
    assert hook(Reading.forward, Reading(), 1) == 20 and notices == {}


@pytest.mark.parametrize(
    ("part", "processes"),
    [
        (SimpleNamespace(tp_size=1), 1),
        (SimpleNamespace(tp_size=2), 2),
        (SimpleNamespace(tp_group=None), 1),
        (SimpleNamespace(tp_group=SimpleNamespace(world_size=1)), 1),
        (SimpleNamespace(tp_group=SimpleNamespace(world_size=4)), 4),
    ],
)
def test_shared_weights_are_seen_in_old_and_new_layers(part: Any, processes: int) -> None:
    assert upstream.processes(part) == processes


def test_a_layer_that_says_nothing_of_processes_is_of_another_make() -> None:
    with pytest.raises(AttributeError):
        upstream.processes(SimpleNamespace())


def test_sampling_kernels_stand_wherever_sglang_has_none(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sampling.KERNELS[0]
    (tmp_path / "aurora_place_without.py").write_text(
        "".join(f"{name} = None\n" for name in sampling.KERNELS)
    )
    (tmp_path / "aurora_place_with.py").write_text(f"{first} = 'SGLang has one'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    places = ("aurora_place_without", "aurora_place_with", "aurora_place_that_is_not_there")
    monkeypatch.setattr(sampling, "PLACES", places)
    sampling.provide()
    import aurora_place_with
    import aurora_place_without

    for name in sampling.KERNELS:
        assert getattr(aurora_place_without, name) is getattr(sampling, name)
    assert vars(aurora_place_with)[first] == "SGLang has one"
    assert not hasattr(aurora_place_with, sampling.KERNELS[1])  # nothing asks for it there
