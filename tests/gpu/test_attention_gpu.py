"""Attention on CUDA, FlashInfer's and PyTorch's, against the definition in float64."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
import torch

from aurora_sgl.drafter.attention import Seen, attend, backends, flashinfer, using
from aurora_sgl.drafter.attention.kernels import plain
from aurora_sgl.drafter.attention.states import merge
from aurora_sgl.errors import AuroraError
from tests.support.attention_cases import Case, answers, cases, define, given, relative_errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)
#: The demo's drafter, and heads as in targets of eight billion parameters.
SHAPES = [
    {"heads": 9, "kv_heads": 3, "head_dim": 64},
    {"heads": 8, "kv_heads": 2, "head_dim": 128},
]
PATTERNS = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


@pytest.fixture
def installed() -> None:
    pytest.importorskip("flashinfer")


def errors(case: Case, shape: dict[str, int], dtype: torch.dtype) -> list[float]:
    exact = given(case, **shape, dtype=dtype)
    inputs = exact.to(dtype, GPU)
    query, key, value, *own = inputs.tensors
    out = attend(
        query, key, value, case.seen(GPU), *(own or (None, None)), own_seen=inputs.own_seen
    )
    return relative_errors(answers(out, inputs), answers(define(case, exact), exact))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape["head_dim"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@PATTERNS
def test_flashinfer_gives_outputs_and_gradients_of_the_definition(
    case: Case, dtype: torch.dtype, shape: dict[str, int], installed: None
) -> None:
    with using("flashinfer"):
        found = errors(case, shape, dtype)
    # Inputs are exact; outputs and FlashInfer's weights are rounded to eight or eleven bits.
    assert max(found) < (1e-2 if dtype == torch.bfloat16 else 2e-3), found


@PATTERNS
def test_pytorch_gives_outputs_and_gradients_of_the_definition(case: Case) -> None:
    with using("sdpa"):
        assert max(errors(case, SHAPES[0], torch.float32)) < 5e-6
        assert max(errors(case, SHAPES[0], torch.bfloat16)) < 4e-3


@PATTERNS
def test_flashinfers_log_sum_exp_is_in_base_2_and_its_states_merge(
    case: Case, installed: None
) -> None:
    query, key, value, *_ = given(case, **SHAPES[0], dtype=torch.bfloat16).tensors
    query, key, value = (x.detach().to(GPU, torch.bfloat16) for x in (query, key, value))
    seen = case.seen(GPU)
    seen = seen if isinstance(seen, Seen) else Seen.up_to(seen)
    key, value = seen.pick(key), seen.pick(value)
    kernels = flashinfer.kernels()
    ours, exact = kernels.text(query, key, value, seen), plain(query, key, value, seen)
    torch.testing.assert_close(ours.lse, exact.lse, rtol=0, atol=2e-2)
    merged, wanted = kernels.merge(ours, exact), merge(exact, exact)
    torch.testing.assert_close(merged.lse, wanted.lse, rtol=0, atol=2e-2)
    torch.testing.assert_close(merged.out, wanted.out, rtol=2e-2, atol=2e-2)


def test_many_plans_in_flight_do_not_overwrite_each_other(installed: None) -> None:
    """Plans go to the GPU from pinned buffers that are filled again: the host runs far ahead."""
    generator = torch.Generator(GPU).manual_seed(0)
    lengths = [3 + 7 * i % 97 for i in range(64)]
    packs = [
        [torch.randn(n, h, 64, device=GPU, generator=generator).bfloat16() for h in (9, 3, 3)]
        for n in lengths
    ]
    busy = torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16)
    with using("flashinfer"), torch.inference_mode():
        attend(*packs[0], Seen.run([0], [lengths[0]]))  # compiled before the race
        torch.cuda.synchronize()
        for _ in range(20):
            busy = busy @ busy * 1e-2
        outs = [attend(*x, Seen.run([0], [n])) for x, n in zip(packs, lengths, strict=True)]
    for out, x, n in zip(outs, packs, lengths, strict=True):
        exact = plain(*x, Seen.run([0], [n])).out
        torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-2)


def test_memory_of_long_texts_stays_bounded() -> None:
    length = 8192
    query, key, value = (
        torch.randn(length, h, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        for h in (9, 3, 3)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(query, key, value, Seen.run([0], [length])).sum().backward()  # type: ignore[no-untyped-call]
    used = torch.cuda.max_memory_allocated() - before
    assert used < 0.5 * 9 * length * length * 4, "all scores at once would be 2.4 GB"


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    flashinfer._probe.cache_clear()
    backends._warn.cache_clear()
    yield
    flashinfer._probe.cache_clear()
    backends._warn.cache_clear()


def test_without_flashinfer_auto_goes_on_with_one_warning(
    fresh_probe: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flashinfer._wrappers.cache_clear()
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    query = torch.randn(4, 3, 64, device=GPU, dtype=torch.bfloat16)
    key = torch.randn(4, 1, 64, device=GPU, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with using("auto"):
                attend(query, key, key, Seen.run([0], [4]))
    assert len(caplog.messages) == 1 and "FlashInfer does not work here" in caplog.messages[0]
    with using("flashinfer"), pytest.raises(AuroraError, match="cannot be used"):
        attend(query, key, key, Seen.run([0], [4]))


def test_what_flashinfer_has_no_kernel_for_runs_on_pytorch(installed: None) -> None:
    for dtype, head_dim in ((torch.float32, 64), (torch.bfloat16, 48)):
        query = torch.randn(4, 3, head_dim, device=GPU, dtype=dtype)
        with using("auto"):
            assert backends.choose(query, 1) is backends.SDPA
    with using("auto"):
        half = torch.randn(4, 3, 64, device=GPU, dtype=torch.bfloat16)
        assert backends.choose(half, 1).name == "flashinfer"
