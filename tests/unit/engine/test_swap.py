"""Staging in pieces: where tensors go, what is refused, and what a model holds before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_sgl.drafter.checkpoint import content_sha256
from aurora_sgl.engine.cpu import linear, packed
from aurora_sgl.engine.swap import Swapper, SwapRefused
from aurora_sgl.engine.swap_pieces import PIECE

HIDDEN, WIDE = 8, 3000  # WIDE rows of HIDDEN: several pieces


def parameter(*shape: int, loader: Any = None, dtype: Any = torch.float32) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    if loader is not None:
        made.weight_loader = loader  # type: ignore[attr-defined]
    return made


def module(**parameters: torch.nn.Parameter) -> torch.nn.Module:
    owner = torch.nn.Module()
    for name, value in parameters.items():
        owner.register_parameter(name, value)
    return owner


def load_qkv(whole: torch.nn.Parameter, loaded: torch.Tensor, shard: str) -> None:
    begin, rows = {"q": (0, WIDE), "k": (WIDE, 4), "v": (WIDE + 4, 4)}[shard]
    part = whole.data.narrow(0, begin, rows)
    assert part.shape == loaded.shape
    part.copy_(loaded)


def load_head(whole: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    """As SGLang's: rows behind the vocabulary are zero."""
    assert loaded.shape[0] <= whole.shape[0]
    whole[: loaded.shape[0]].data.copy_(loaded)
    whole[loaded.shape[0] :].data.fill_(0)


def load_down(whole: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    """The second of two ranks' columns."""
    whole.data.copy_(loaded.narrow(1, whole.shape[1], whole.shape[1]))


def load_odd(whole: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    """More than a copy of a part."""
    whole.data.copy_(torch.cat([loaded[1:], loaded[:1]]))


class House:
    def __init__(self, folder: Path, *, down: Any = None, dtype: Any = torch.float32) -> None:
        self.folder, self.version = folder, 0
        self.model = torch.nn.Module()
        self.model.self_attn = torch.nn.Module()
        self.model.self_attn.qkv_proj = module(weight=parameter(WIDE + 8, HIDDEN, loader=load_qkv))
        self.model.down = module(weight=parameter(WIDE, HIDDEN, loader=down, dtype=dtype))
        self.model.lm_head = module(weight=parameter(20, HIDDEN, loader=load_head))
        self.model.norm = module(weight=parameter(HIDDEN))
        self.hot = torch.arange(6)
        self.target = torch.nn.Linear(2, 2)
        self.swapper = Swapper(self.model, self.target, self.hot, 40)

    def tensors(self, seed: int, **change: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        ids = torch.randperm(40)[:6].sort().values
        inside = torch.zeros(40, dtype=torch.bool)
        inside[ids] = True
        tensors = {
            "self_attn.q_proj.weight": torch.randn(WIDE, HIDDEN),
            "self_attn.k_proj.weight": torch.randn(4, HIDDEN),
            "self_attn.v_proj.weight": torch.randn(4, HIDDEN),
            "down.weight": torch.randn(WIDE, HIDDEN),
            "lm_head.weight": torch.randn(17, HIDDEN),
            "norm.weight": torch.randn(HIDDEN),
            "d2t": ids - torch.arange(6),
            "t2d": inside,
            **change,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def file(self, tensors: dict[str, torch.Tensor]) -> Path:
        self.version += 1
        path = self.folder / f"{self.version}.safetensors"
        save_file(tensors, path)
        return path

    def state(self) -> dict[str, torch.Tensor]:
        state = {name: value.clone() for name, value in self.model.named_parameters()}
        return {**state, "hot": self.hot.clone()}

    def holds(self, state: dict[str, torch.Tensor]) -> bool:
        now = self.state()
        return all(torch.equal(now[name], value) for name, value in state.items())


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def work(swapper: Swapper) -> int:
    """Until the task is done, a piece at a time; how many it took."""
    steps = 0
    while swapper.busy:
        swapper.work(0.0, 1)
        steps += 1
    return steps


def test_pieces_go_where_the_loader_would_put_them_and_nothing_is_live_before(
    house: House,
) -> None:
    for seed in (1, 2, 3):
        tensors, before = house.tensors(seed), house.state()
        path = house.file(tensors)
        house.swapper.begin_staging(seed, path, "", consume=True)
        steps = work(house.swapper)
        assert steps > 2 * WIDE * HIDDEN * 4 // PIECE
        staged = house.swapper.staged
        assert house.swapper.failure is None and staged is not None and house.holds(before)
        assert path.stat().st_size < 2000, "what was staged is gone from the file"
        house.swapper.apply(staged)
        qkv = house.model.self_attn.qkv_proj.weight
        names = [f"self_attn.{part}_proj.weight" for part in "qkv"]
        assert torch.equal(qkv, torch.cat([tensors[name] for name in names]))
        assert torch.equal(house.model.lm_head.weight[:17], tensors["lm_head.weight"])
        assert not house.model.lm_head.weight[17:].any()
        assert torch.equal(house.hot, tensors["d2t"] + torch.arange(6))
        house.swapper.begin_read_back(staged, whole=True, leads=True)
        assert work(house.swapper) > 2 * WIDE * HIDDEN * 4 // PIECE
        assert house.swapper.unread == ""
        assert content_sha256(load_file(path)) == content_sha256(tensors)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("served", [torch.bfloat16, torch.float32])
def test_what_is_read_back_has_the_dtypes_of_the_file(
    tmp_path: Path, stored: torch.dtype, served: torch.dtype
) -> None:
    house = House(tmp_path, dtype=served)
    weight = torch.randn(WIDE, HIDDEN).to(torch.bfloat16).to(stored)  # served without a loss
    tensors = house.tensors(1, **{"down.weight": weight})
    path = house.file(tensors)
    house.swapper.begin_staging(1, path, "", consume=True)
    work(house.swapper)
    assert house.swapper.staged is not None, house.swapper.failure
    house.swapper.apply(house.swapper.staged)
    house.swapper.begin_read_back(house.swapper.staged, whole=True, leads=True)
    work(house.swapper)
    assert house.swapper.unread == ""
    assert content_sha256(load_file(path)) == content_sha256(tensors)


def test_what_is_read_back_is_the_models_own(house: House) -> None:
    tensors = house.tensors(1)
    path = house.file(tensors)
    house.swapper.begin_staging(1, path, "", consume=True)
    work(house.swapper)
    assert house.swapper.staged is not None
    house.swapper.apply(house.swapper.staged)
    house.model.down.weight[WIDE - 1, 3] += 1
    house.swapper.begin_read_back(house.swapper.staged, whole=True, leads=True)
    work(house.swapper)
    tensors["down.weight"][WIDE - 1, 3] += 1
    assert content_sha256(load_file(path)) == content_sha256(tensors)


def test_going_live_copies_nothing_on_a_cpu_and_memory_goes_round(house: House) -> None:
    def addresses() -> list[int]:
        return [p.data_ptr() for p in house.model.parameters()]

    rounds = []
    for seed in (1, 2, 3):
        rounds.append(addresses())
        staged = house.swapper.stage(seed, house.file(house.tensors(seed)), None)
        house.swapper.apply(staged)
    assert rounds[0] == rounds[2] and not set(rounds[0]) & set(rounds[1])
    assert all(isinstance(p, torch.nn.Parameter) for p in house.model.parameters())
    assert house.model.lm_head.weight.weight_loader is load_head


def test_parameters_that_share_memory_go_on_sharing_it(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.model.norm.weight.data = house.model.lm_head.weight.data[3]
    swapper = Swapper(house.model, house.target, house.hot, 40)
    address = house.model.norm.weight.data_ptr()
    swapper.apply(swapper.stage(1, house.file(house.tensors(1)), None))
    assert house.model.norm.weight.data_ptr() == address


@pytest.mark.parametrize("down", [load_down, load_odd])
def test_shards_and_odd_loaders_get_what_they_would_load_themselves(
    tmp_path: Path, down: Any
) -> None:
    house = House(tmp_path, down=down, dtype=torch.bfloat16)
    width = 2 * HIDDEN if down is load_down else HIDDEN
    tensors = house.tensors(1, **{"down.weight": torch.randn(WIDE, width)})
    house.swapper.begin_staging(1, house.file(tensors), "")
    work(house.swapper)
    staged = house.swapper.staged
    assert staged is not None, house.swapper.failure
    house.swapper.apply(staged)
    wanted = parameter(WIDE, HIDDEN, dtype=torch.bfloat16)
    down(wanted, tensors["down.weight"])
    assert torch.equal(house.model.down.weight, wanted)
    house.swapper.begin_read_back(staged, whole=False, leads=True)
    work(house.swapper)
    assert house.swapper.unread == ""


def test_a_shard_that_is_not_what_was_staged_is_told(tmp_path: Path) -> None:
    house = House(tmp_path, down=load_down)
    tensors = house.tensors(1, **{"down.weight": torch.randn(WIDE, 2 * HIDDEN)})
    staged = house.swapper.stage(1, house.file(tensors), "0" * 64)
    house.swapper.apply(staged)
    house.model.down.weight[5, 5] += 1
    with pytest.raises(SwapRefused, match="not what was staged"):
        house.swapper.read_back(staged, whole=False)


def test_a_drafter_of_the_whole_vocabulary_is_swapped_without_maps(house: House) -> None:
    swapper = Swapper(house.model, house.target, None, 40)
    tensors = house.tensors(1, d2t=None, t2d=None)
    path = house.file(tensors)
    swapper.begin_staging(1, path, "", consume=True)
    work(swapper)
    staged = swapper.staged
    assert staged is not None
    swapper.apply(staged)
    swapper.begin_read_back(staged, whole=True, leads=True)
    work(swapper)
    assert swapper.unread == "" and content_sha256(load_file(path)) == content_sha256(tensors)
    with pytest.raises(SwapRefused, match="has no draft vocabulary, the new one has"):
        swapper.stage(2, house.file(house.tensors(2)), None)


REFUSALS = {
    "does not fit": {"norm.weight": torch.zeros(HIDDEN + 1)},
    "no parameter for 'strange'": {"strange": torch.zeros(2)},
    "lack 'norm.weight'": {"norm.weight": None},
    "lack 'self_attn.qkv_proj.weight'": {"self_attn.k_proj.weight": None},
    "lack the draft vocabulary": {"d2t": None},
    "drafts 7 tokens, the running one 6": {"d2t": torch.zeros(7, dtype=torch.int64)},
    "tokens that the target does not have": {"d2t": torch.full((6,), 40)},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_changes(house: House, reason: str) -> None:
    before = house.state()
    path = house.file(house.tensors(1, **REFUSALS[reason]))
    house.swapper.begin_staging(1, path, "")
    work(house.swapper)
    assert house.swapper.staged is None and house.swapper.failure is not None
    version, told = house.swapper.failure
    assert version == 1 and reason in told and "\n" not in told and house.holds(before)


def test_the_targets_tensors_are_never_staged(tmp_path: Path) -> None:
    house = House(tmp_path)
    swapper = Swapper(house.model, house.model.lm_head, house.hot, 40)
    with pytest.raises(SwapRefused, match="share storage"):
        swapper.stage(1, house.file(house.tensors(1)), None)
    left = house.tensors(1)
    del left["lm_head.weight"]
    address = house.model.lm_head.weight.data_ptr()
    swapper.apply(swapper.stage(1, house.file(left), None))
    assert house.model.lm_head.weight.data_ptr() == address


def test_an_exchange_that_breaks_leaves_the_old_weights_live(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.swapper.apply(house.swapper.stage(1, house.file(house.tensors(1)), None))
    before = house.state()
    staged = house.swapper.stage(2, house.file(house.tensors(2)), None)
    with monkeypatch.context() as patch:
        patch.setattr(house.swapper, "_exchange_vocabulary", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            house.swapper.apply(staged)
    assert house.holds(before)
    staged = house.swapper.stage(2, house.file(house.tensors(2)), None)
    house.swapper.apply(staged)
    assert not house.holds(before)
    house.swapper.undo(staged)
    assert house.holds(before)


def test_packed_copies_follow_the_weights_and_come_back_with_them(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_packed", {})
    weight = house.model.down.weight
    first = packed.Packed(weight=weight.detach().clone())
    linear._packed[weight.data_ptr()] = (weight, first)
    monkeypatch.setattr(
        "aurora_sgl.engine.swap.pack", lambda one: packed.Packed(weight=one.detach().clone())
    )
    tensors = house.tensors(1)
    staged = house.swapper.stage(1, house.file(tensors), None)
    assert linear._packed[weight.data_ptr()][1] is first
    house.swapper.apply(staged)
    (entry,) = linear._packed.items()
    assert entry[0] == weight.data_ptr() and torch.equal(entry[1][1].weight, tensors["down.weight"])
    house.swapper.undo(staged)
    (entry,) = linear._packed.items()
    assert entry[0] == weight.data_ptr() and entry[1][1] is first


def test_a_swap_under_inference_mode_leaves_parameters_that_a_later_one_can_change(
    house: House,
) -> None:
    with torch.inference_mode():
        swapper = Swapper(house.model, house.target, house.hot, 40)
        for seed in (1, 2):
            swapper.apply(swapper.stage(seed, house.file(house.tensors(seed)), None))
            assert torch.is_inference_mode_enabled()
    assert not any(p.is_inference() for p in house.model.parameters())


def test_without_memory_for_shadows_swaps_are_refused_and_nothing_else_fails(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> Any:
        raise RuntimeError("out of memory\nfor ever")

    monkeypatch.setattr("aurora_sgl.engine.shadows.shadow", none)
    swapper = Swapper(house.model, house.target, house.hot, 40)
    assert swapper.read_back_at_start(house.file(house.tensors(1)), whole=True) == ""
    with pytest.raises(SwapRefused, match=r"no memory for a second copy .*out of memory\)"):
        swapper.stage(1, house.file(house.tensors(1)), None)


def test_a_server_without_a_sidecar_spends_no_memory_on_swaps(house: House) -> None:
    swapper = Swapper(house.model, house.target, house.hot, 40, swaps=False)
    assert swapper.shadow_bytes == 0 < house.swapper.shadow_bytes
    with pytest.raises(SwapRefused, match="no sidecar"):
        swapper.stage(1, house.file(house.tensors(1)), None)


def test_the_hash_at_the_start_is_that_of_the_model_whole_or_in_shards(house: House) -> None:
    tensors = house.tensors(1)
    path = house.file(tensors)
    house.swapper.apply(house.swapper.stage(1, path, None))
    for whole in (True, False):
        assert house.swapper.read_back_at_start(path, whole=whole) == content_sha256(tensors)
    house.model.norm.weight[0] += 1
    assert house.swapper.read_back_at_start(path, whole=True) != content_sha256(tensors)
    with pytest.raises(SwapRefused, match="not what was staged"):
        house.swapper.read_back_at_start(path, whole=False)
