"""Attention of every pattern, its gradients, packing and merging, against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from aurora_sgl.config import get_settings
from aurora_sgl.drafter.attention import Seen, attend, backends, flashinfer, kernels, using
from aurora_sgl.drafter.attention.function import AttentionFunction
from aurora_sgl.drafter.attention.kernels import Kernels, plain, sdpa
from aurora_sgl.drafter.attention.states import AttentionState, merge
from aurora_sgl.errors import AuroraError
from tests.support.attention_cases import (
    Case,
    answers,
    cases,
    define,
    given,
    relative_errors,
    tree_mask,
)

CPU = torch.device("cpu")
SHAPE = {"heads": 6, "kv_heads": 2, "head_dim": 8}
PATTERNS = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
KERNELS = pytest.mark.parametrize("kernel", [plain, sdpa], ids=lambda kernel: kernel.__name__)


def ours(case: Case, dtype: torch.dtype, kernel: kernels.TextKernel) -> list[float]:
    exact = given(case, **SHAPE, dtype=dtype)
    inputs = exact.to(dtype, CPU)
    with using(Kernels("tested", kernel)):
        query, key, value, *own = inputs.tensors
        out = attend(
            query, key, value, case.seen(CPU), *(own or (None, None)), own_seen=inputs.own_seen
        )
    assert out.dtype == dtype
    return relative_errors(answers(out, inputs), answers(define(case, exact), exact))


@KERNELS
@PATTERNS
def test_outputs_and_gradients_are_those_of_the_definition(
    case: Case, kernel: kernels.TextKernel
) -> None:
    assert max(ours(case, torch.float64, kernel)) < 1e-12
    assert max(ours(case, torch.float32, kernel)) < 2e-6


@PATTERNS
def test_in_bfloat16_only_inputs_and_outputs_are_rounded(case: Case) -> None:
    assert max(ours(case, torch.bfloat16, sdpa)) < 4e-3


@pytest.mark.parametrize("rows", [1, 3, 7])
@PATTERNS
def test_blocks_of_any_size_give_the_same(
    case: Case, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_SCORES", rows * 6 * 12)
    monkeypatch.setattr("aurora_sgl.drafter.attention.function.BLOCK_SCORES", rows * 6 * 12)
    monkeypatch.setitem(kernels.BLOCK_ROWS, "cpu", 2 * rows)
    assert max(ours(case, torch.float64, plain)) < 1e-12


@PATTERNS
def test_blocks_cover_what_is_seen_once_and_stay_within_their_limits(case: Case) -> None:
    seen = case.seen(CPU)
    seen = seen if isinstance(seen, Seen) else Seen.up_to(seen)
    wanted = torch.zeros(seen.queries, sum(case.texts), dtype=torch.int64)
    at = begin = 0
    for visible in case.visible:
        wanted[at : at + len(visible), begin : begin + visible.shape[1]] = visible.long()
        at, begin = at + len(visible), begin + visible.shape[1]
    found = torch.zeros(seen.queries, seen.text, dtype=torch.int64)
    for block in seen.blocks(40, 4, CPU):
        count, text = (x.stop - x.start for x in (block.queries, block.text))
        assert count == 1 or (count <= 4 and count * text <= 40)
        rows = torch.ones(count, text, dtype=torch.int64)
        rows[:, block.tail] -= block.hidden.long()
        found[block.queries, block.text] += rows
    assert torch.equal(found, seen.pick(wanted.T).T)
    assert int(found.sum()) == int(wanted.sum())


def test_autograd_agrees_with_finite_differences() -> None:
    case = next(c for c in cases() if c.name == "packed beam slots")
    inputs = given(case, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64)
    seen = case.seen(CPU)
    assert isinstance(seen, Seen)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *own: torch.Tensor):
        picked = seen.pick(key), seen.pick(value)
        return AttentionFunction.apply(Kernels("plain", plain), seen, query, *picked, *own, None)

    assert torch.autograd.gradcheck(run, inputs.tensors, fast_mode=True)


def test_a_tree_by_mask_equals_the_same_tree_by_each_nodes_own_rows() -> None:
    """The ways of a mask (nodes behind the text) and of own rows (ancestors of each node)."""
    parents, text = [-1, 0, 0, 1], 5
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(n, h, 8, generator=generator) for n, h in ((4, 6), (9, 2), (9, 2))
    )
    whole = attend(query, key, value, Seen.masks([tree_mask(text, parents)]))
    path = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 1, 3]])
    kept = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    last = torch.full((4,), text - 1)
    nodes = (key[text + path], value[text + path])
    torch.testing.assert_close(attend(query, key, value, last, *nodes, own_seen=kept), whole)


@KERNELS
def test_states_of_two_halves_merge_into_the_state_of_the_whole(kernel: kernels.TextKernel) -> None:
    generator = torch.Generator().manual_seed(0)
    query = 4 * torch.randn(5, 4, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(11, 2, 8, generator=generator, dtype=torch.float64) for _ in "kv")

    def over(rows: slice) -> AttentionState:
        count = len(range(11)[rows])
        return kernel(query, key[rows], value[rows], Seen.masks([torch.ones(5, count) > 0]))

    whole, merged = over(slice(0, 11)), merge(over(slice(0, 4)), over(slice(4, 11)))
    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)
    scores = torch.einsum("qhd,thd->qht", query, key.repeat_interleave(2, 1)) / 8**0.5
    torch.testing.assert_close(whole.lse, torch.log2(scores.exp().sum(-1)))
    nothing = AttentionState(torch.zeros_like(whole.out), torch.full_like(whole.lse, -math.inf))
    torch.testing.assert_close(merge(whole, nothing).out, whole.out)


def test_scores_far_apart_neither_overflow_nor_lose_the_own_rows() -> None:
    query = torch.full((2, 2, 4), 100.0, requires_grad=True)
    text = torch.stack((torch.full((1, 4), -100.0), torch.full((1, 4), 100.0)))
    own = torch.full((2, 1, 1, 4), 100.0, requires_grad=True)
    value = torch.tensor([1.0, 2.0])[:, None, None].expand(2, 1, 4)
    out = attend(query, text, value, torch.tensor([0, 1]), own, torch.full((2, 1, 1, 4), 4.0))
    # Query 0 sees a row that vanishes beside its own; query 1 a row that is like its own.
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([4.0, 3.0]))
    out.sum().backward()
    assert query.grad is not None and bool(query.grad.isfinite().all())
    assert own.grad is not None and bool(own.grad.isfinite().all())


def test_autocast_around_it_changes_nothing() -> None:
    case = next(c for c in cases() if c.name == "unrolled")
    inputs = given(case, **SHAPE, dtype=torch.float32).to(torch.float32, CPU)

    def run() -> torch.Tensor:
        query, key, value, own_key, own_value = inputs.tensors
        return attend(query, key, value, case.seen(CPU), own_key, own_value)

    plainly = answers(run(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = answers(run(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plainly, inside, strict=True))


def test_rows_in_a_run_need_no_mask_and_are_found_by_looking() -> None:
    run = Seen.run([3, 0], [4, 2])
    assert run == Seen.up_to(torch.tensor([3, 4, 5, 6, 0, 1]), [4, 2])
    assert run.mask is None and run.text_indptr == (0, 7, 9)
    assert Seen.up_to(torch.tensor([3, 3])).mask is not None
    text = torch.arange(20)
    padded = Seen.run([3, 0], [4, 2], texts=[10, 10])
    assert padded.pick(text).tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11]


def test_lengths_that_do_not_fit_are_refused() -> None:
    query, key = torch.randn(3, 2, 4), torch.randn(5, 2, 4)
    with pytest.raises(AssertionError):
        attend(query, key, key, Seen.run([0], [2]))
    with pytest.raises(AssertionError):
        attend(query, key, key, Seen.run([4], [3]))
    with pytest.raises(AssertionError):
        Seen.run([4], [3], texts=[6])


def test_without_cuda_pytorch_computes_and_flashinfer_by_name_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key = torch.randn(3, 3, 64), torch.randn(3, 1, 64)
    assert backends.choose(query, 1) is backends.SDPA
    with using("flashinfer"), pytest.raises(AuroraError, match="on cpu, not on CUDA; set it to"):
        attend(query, key, key, torch.arange(3))
    monkeypatch.setenv("AURORA_ATTENTION", "flashinfer")
    get_settings.cache_clear()
    try:
        with pytest.raises(AuroraError, match="attention=flashinfer cannot be used"):
            attend(query, key, key, torch.arange(3))
        with using("sdpa"):
            assert backends.choose(query, 1) is backends.SDPA
    finally:
        monkeypatch.undo()
        get_settings.cache_clear()


def test_a_flashinfer_that_cannot_run_says_why_in_one_line() -> None:
    """Here it is not installed or has no GPU; the probe that ``auto`` relies on reports either."""
    wrong = flashinfer.trouble(torch.zeros(1, 3, 64, dtype=torch.bfloat16), 1)
    assert wrong is not None and "\n" not in wrong and "Error" in wrong
