"""Room for the next version is taken before SGLang sizes its KV pool, and used by the swapper."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_sgl import environment
from aurora_sgl.engine import plugin, shadows
from aurora_sgl.engine.swap import Swapper


class LlamaForCausalLMEagle3(torch.nn.Module):
    """The name of SGLang's own, with an embedding that the target's takes the place of."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(8, 4)
        self.model.fc = torch.nn.Linear(4, 4)
        self.lm_head = torch.nn.Linear(4, 6, bias=False)


class LlamaForCausalLMEagle(LlamaForCausalLMEagle3):
    """Its head is the target's too."""


class Unknown(LlamaForCausalLMEagle3):
    """Of an architecture that we don't know."""


class EAGLEWorkerV2:
    def __init__(self, model: torch.nn.Module) -> None:
        self.draft_worker = SimpleNamespace(draft_runner=SimpleNamespace(model=model))


@pytest.mark.parametrize(
    ("kind", "values"),
    [(LlamaForCausalLMEagle3, 4 * 4 + 4 + 6 * 4), (LlamaForCausalLMEagle, 4 * 4 + 4), (Unknown, 0)],
)
def test_what_will_be_the_targets_is_not_reserved(kind: Any, values: int) -> None:
    worker = EAGLEWorkerV2(kind())
    assert shadows.reserve(worker) == 4 * values
    assert sum(one.numel() for one in shadows.take(worker).values()) == values
    assert shadows.take(worker) == {}


def test_the_swapper_uses_what_was_reserved() -> None:
    model = LlamaForCausalLMEagle3()
    worker = EAGLEWorkerV2(model)
    shadows.reserve(worker)
    room = dict(shadows.take(worker))
    target = torch.nn.Embedding(8, 4)
    model.model.embed_tokens.weight = target.weight  # as SGLang does after the pool is made
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.lm_head.weight.weight_loader = print  # type: ignore[attr-defined]
    swapper = Swapper(model, target, None, 8, reserved=room)
    assert swapper._shadows.keys() == room.keys()
    assert all(swapper._shadows[name] is room[name] for name in room)
    assert swapper._shadows["lm_head.weight"].equal(model.lm_head.weight)
    assert swapper._shadows["lm_head.weight"].weight_loader is print  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", ["dtype", "shape", "layout", "nothing reserved"])
def test_a_parameter_that_became_another_gets_a_new_shadow(change: str) -> None:
    reserved = torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False)
    now = {
        "dtype": torch.ones(4, 6, dtype=torch.bfloat16),
        "shape": torch.ones(4, 5),
        "layout": torch.ones(6, 4).T,
        "nothing reserved": torch.ones(4, 6),
    }[change]
    parameter = torch.nn.Parameter(now, requires_grad=False)
    made = shadows.of(parameter, None if change == "nothing reserved" else reserved)
    assert made is not reserved and made.equal(parameter)
    assert made.data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("endpoint", ["", "/somewhere"])
def test_room_is_taken_before_the_pool_and_the_pool_is_made_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, fails: bool, endpoint: str
) -> None:
    happened: list[str] = []

    def reserve(worker: Any) -> int:
        happened.append("room")
        if fails:
            raise RuntimeError("out of memory")
        return 1

    monkeypatch.setattr(shadows, "reserve", reserve)
    monkeypatch.setenv(environment.ENDPOINT, endpoint)
    scheduler = SimpleNamespace(draft_worker=EAGLEWorkerV2(torch.nn.Linear(1, 1)))
    plugin._init_memory_pools(lambda *_: happened.append("pool"), scheduler)
    assert happened == (["room", "pool"] if endpoint else ["pool"])
    plugin._init_memory_pools(lambda *_: happened.append("plain"), SimpleNamespace())
    assert happened[-1] == "plain"
