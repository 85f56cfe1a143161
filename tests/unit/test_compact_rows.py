"""Rows of numbers in a few bits each: what comes back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aurora_sgl import compact_rows
from aurora_sgl.compact_rows import BLOCK, CompactRows, compact, numbers

BITS = [4, 5, 6, 7, 8]


def raw(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8)


def there_and_back(rows: np.ndarray, bits: int) -> np.ndarray:
    return numbers(compact(raw(rows), str(rows.dtype), bits))


def bound(rows: np.ndarray, bits: int) -> np.ndarray:
    """Half a step of each number's block, which is at most a sixteenth of an octave too large;
    nothing of a block can be lost that is more than 2^-15 of its row."""
    small = compact(raw(rows), "float32", bits)
    factors = 2.0 ** (small.channels / -8.0)
    padded = np.pad(np.abs(rows / factors), ((0, 0), (0, -rows.shape[1] % BLOCK)))
    largest = padded.reshape(len(rows), -1, BLOCK).max(-1)
    half = largest * 2 ** (1.1 / 16) / (2 ** (bits - 1) - 1) / 2
    half = np.where(largest > 2.0**-15.8 * largest.max(-1, keepdims=True), half, largest)
    return np.repeat(half, BLOCK, axis=1)[:, : rows.shape[1]] * factors * 1.00001 + 1e-37


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [BLOCK, 576, 100, 3, 4 * BLOCK + 1])
def test_no_number_is_further_off_than_half_a_step_of_its_block(bits: int, width: int) -> None:
    rows = np.random.default_rng(width).standard_normal((37, width)).astype(np.float32)
    assert (np.abs(there_and_back(rows, bits) - rows) <= bound(rows, bits)).all()


def test_a_massive_number_costs_its_own_block_alone() -> None:
    """One of one row, as a text's first token has it."""
    rows = np.random.default_rng(0).standard_normal((40, 8 * BLOCK)).astype(np.float32)
    plain = np.abs(there_and_back(rows, 4) - rows)
    rows[0, 70] = 1000.0
    massive = np.abs(there_and_back(rows, 4) - rows)
    elsewhere = np.arange(8 * BLOCK) // BLOCK != 70 // BLOCK
    assert massive[0, 70] < 1.0 and massive[:, elsewhere].max() < 1.05 * plain.max()
    assert massive[0, ~elsewhere].max() < 5, "beside it what was small is nothing"
    assert massive[1:].max() < 1.05 * plain.max()


def test_channels_of_many_sizes_cost_less_than_blocks_alone_would() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 8 * BLOCK)).astype(np.float32)
    sizes = np.random.default_rng(1).lognormal(0, 1.2, 8 * BLOCK).astype(np.float32)
    off = there_and_back(rows * sizes, 4) - rows * sizes
    assert np.linalg.norm(off) < 0.08 * np.linalg.norm(rows * sizes), "0.14 without their factors"


@given(
    arrays(np.float32, (3, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.sampled_from(BITS),
)
def test_any_finite_row_comes_back_within_its_bound(rows: np.ndarray, bits: int) -> None:
    assert (np.abs(there_and_back(rows, bits) - rows) <= bound(rows, bits)).all()


def test_zeros_stay_zeros_and_no_rows_are_no_rows() -> None:
    rows = np.zeros((2, 64), np.float32)
    assert not there_and_back(rows, 4).any()
    rows[0, :3] = 7.0
    assert there_and_back(rows, 4)[0, :3] == pytest.approx(7.0)
    assert not there_and_back(rows, 4)[0, 3:].any()
    assert numbers(compact(raw(np.zeros((0, 64), np.float32)), "float32", 5)).shape == (0, 64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_16_bits_are_read_as_what_they_are(dtype: str) -> None:
    wide = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    if dtype == "float16":
        rows = raw(wide.astype(np.float16))
    else:
        rows = raw((wide.view(np.uint32) >> 16).astype(np.uint16))
    assert numbers(compact(rows, dtype, 8)) == pytest.approx(wide, abs=0.03)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (50, 63)])
def test_a_row_with_a_number_that_is_not_finite_is_refused(
    odd: float, place: tuple[int, int]
) -> None:
    rows = np.ones((51, 64), np.float32)
    rows[place] = odd
    with pytest.raises(ValueError, match="not finite"):
        compact(raw(rows), "float32", 4)


def test_bytes_of_a_row_are_what_it_takes() -> None:
    for width in (576, 100):
        for bits in BITS:
            small = compact(raw(np.ones((2, width), np.float32)), "float32", bits)
            size = small.packed.nbytes + small.codes.nbytes + small.largest.nbytes
            assert small.channels.nbytes == width
            assert size == 2 * compact_rows.row_bytes(width, bits)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    good = compact(raw(np.ones((2, 64), np.float32)), "float32", 4)
    for parts in (
        (good.packed[:1], good.codes, good.largest, good.channels, 4, 64),
        (good.packed, good.codes, good.largest, good.channels, 5, 64),
        (good.packed, good.codes, good.largest, good.channels, 9, 64),
        (good.packed, good.codes, good.largest, good.channels, 4, 128),
        (good.packed, good.codes[:, :1], good.largest, good.channels, 4, 64),
        (good.packed, good.codes, good.largest, good.channels[:3], 4, 64),
        (good.packed, good.codes, good.largest * np.float32(np.nan), good.channels, 4, 64),
    ):
        with pytest.raises(ValueError):
            CompactRows(*parts)
