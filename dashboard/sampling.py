"""Sampling parameters as people read them: what changes nothing says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aurora_sgl.wire import WITHOUT_DRAFTS

OFF = "off"
#: SGLang writes "the whole vocabulary" and "until the context ends" as numbers from here on
#: (0.5.21: TOP_K_ALL in sampling_params.py).
BOUNDLESS = 1 << 30
#: Values at which a parameter does nothing.
NEUTRAL = {
    "top_p": 1.0, "min_p": 0.0, "min_new_tokens": 0, "frequency_penalty": 0.0,
    "presence_penalty": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip


def told(sampling: Mapping[str, Any]) -> str:
    """``temperature greedy, top_k off, ...``; empty when nothing was recorded."""
    names = sorted(name for name in sampling if name != WITHOUT_DRAFTS)
    return ", ".join(f"{name} {_value(name, sampling)}" for name in names)


def _value(name: str, sampling: Mapping[str, Any]) -> str:
    value = sampling[name]
    if name == "temperature" and is_greedy(sampling):
        return "greedy"
    if name == "top_k":
        return OFF if value is None or value <= 0 or value >= BOUNDLESS else f"{value:,}"
    if name == "max_new_tokens":
        return "no limit" if value is None or not 0 <= value < BOUNDLESS else f"{value:,}"
    if value is None or value is False or _is_neutral(name, value):
        return OFF
    return "on" if value is True else f"{value}"


def is_greedy(sampling: Mapping[str, Any]) -> bool:
    """SGLang turns temperature 0 into top-k 1, and records that."""
    return sampling.get("temperature") == 0 or sampling.get("top_k") == 1


def _is_neutral(name: str, value: Any) -> bool:
    """-1 says "none" of every parameter but the penalties, which may be negative."""
    return value == NEUTRAL.get(name) or (value == -1 and not name.endswith("_penalty"))
