"""How many tokens the KV pool of a server on CPU holds, where the user does not say.

SGLang (0.5.21) takes most of a machine's memory for it: 14 of 24 GB for 135M parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from aurora_sgl.engine.flags import value_of

#: Flags by which a user says how large the pool is.
SIZED_BY = ("--max-total-tokens", "--mem-fraction-static")
#: Requests that SGLang runs at once under speculation, unless told (0.5.21 to 0.5.23).
RUNNING = 48
#: Places beyond a request's context: drafts past its end, and the rest of a page.
_BEYOND = 64
_SHARE = 3  # a third of the memory, at most


class Pool(NamedTuple):
    tokens: int
    token_bytes: int  # of one token, in all layers of target and drafter

    @property
    def bytes(self) -> int:
        return self.tokens * self.token_bytes


def choose(
    configs: list[Mapping[str, Any]], args: list[str], available: int, *, dtype: str
) -> Pool | None:
    """What all requests can use, and at most a third of the available bytes.

    ``configs``: the target's ``config.json`` and its drafter's. None: the user said it, or a
    config does not say enough.
    """
    if any(value_of(args, flag) is not None for flag in SIZED_BY):
        return None
    size = _value_bytes(value_of(args, "--kv-cache-dtype") or "auto", dtype)
    token_bytes = sum(_layer_values(config) for config in configs) * size
    context = _context(configs[0], args)
    if not token_bytes or not context:
        return None
    running = _number(args, "--max-running-requests") or RUNNING
    replicas = _number(args, "--dp-size", "--data-parallel-size", "--dp") or 1
    room = available // _SHARE // replicas // token_bytes
    return Pool(min(running * (context + _BEYOND), room), token_bytes)


def _number(args: list[str], *names: str) -> int:
    """What the user gave under one of the names; 0: nothing, or what SGLang will refuse."""
    words = [value_of(args, name) or "" for name in names]
    return next((int(word) for word in words if word.isdecimal()), 0)


def _layer_values(config: Mapping[str, Any]) -> int:
    """Numbers that one token leaves in the KV cache; 0: the config does not say."""
    try:
        heads = int(config["num_attention_heads"])
        width = int(config.get("head_dim") or config["hidden_size"] // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return int(config["num_hidden_layers"]) * kv_heads * width * 2
    except (KeyError, TypeError, ValueError):
        return 0


def _value_bytes(cache_dtype: str, dtype: str) -> int:
    if cache_dtype.startswith(("fp8", "float8")):
        return 1
    return 4 if (dtype if cache_dtype == "auto" else cache_dtype) == "float32" else 2


def _context(config: Mapping[str, Any], args: list[str]) -> int:
    if length := _number(args, "--context-length"):
        return length
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    # A config with the original length has the scaled one as its length.
    scaled = 1.0 if "original_max_position_embeddings" in rope else float(rope.get("factor") or 1.0)
    return int(int(config.get("max_position_embeddings") or 0) * max(scaled, 1.0))
