"""Which backend computes: FlashInfer on CUDA, PyTorch elsewhere and where FlashInfer fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

from aurora_sgl.config import get_settings
from aurora_sgl.drafter.attention import flashinfer
from aurora_sgl.drafter.attention.kernels import Kernels, sdpa
from aurora_sgl.errors import AuroraError

logger = logging.getLogger(__name__)

NAMES = ("auto", "flashinfer", "sdpa")
SDPA = Kernels("sdpa", sdpa)

_given: ContextVar[str | Kernels | None] = ContextVar("attention", default=None)


@contextmanager
def using(backend: str | Kernels) -> Iterator[None]:
    """Another backend than the setting's inside a ``with``: a name of ``NAMES``, or kernels."""
    assert isinstance(backend, Kernels) or backend in NAMES, backend
    token = _given.set(backend)
    try:
        yield
    finally:
        _given.reset(token)


def choose(query: torch.Tensor, kv_heads: int) -> Kernels:
    """The kernels for a query of this device, dtype and shape.

    ``auto`` takes FlashInfer where its kernels fit and work; where they fit and fail it says so
    once and goes on without. Raises ``AuroraError`` when ``flashinfer`` was asked for by name and
    does not fit or work.
    """
    name = _given.get() or get_settings().attention
    if isinstance(name, Kernels):
        return name
    if name == "sdpa":
        return SDPA
    wrong = flashinfer.unfit(query)
    if wrong is None:
        wrong = flashinfer.trouble(query, kv_heads)
        if wrong is None:
            return flashinfer.kernels()
        if name == "auto":
            _warn(wrong)
    if name == "flashinfer":
        raise AuroraError(f"attention=flashinfer cannot be used: {wrong}; set it to auto or sdpa")
    return SDPA


@lru_cache(maxsize=8)
def _warn(wrong: str) -> None:
    logger.warning("attention runs on PyTorch, FlashInfer does not work here: %s", wrong)
