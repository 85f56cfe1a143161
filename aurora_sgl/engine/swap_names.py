"""Where a tensor of a drafter's file belongs in SGLang's model of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from aurora_sgl.engine.swap_file import SwapRefused

#: SGLang fuses these; (name in the file, name in the model, shard id of the weight loader).
_FUSED = (
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".gate_proj.", ".gate_up_proj.", 0),
    (".up_proj.", ".gate_up_proj.", 1),
)
_RENAMED = (
    ("midlayer", "layers.0"),
    ("aux_norm_low", "fc_norm.0"),
    ("aux_norm_mid", "fc_norm.1"),
    ("aux_norm_high", "fc_norm.2"),
)
_VOCABULARY = ("d2t", "t2d")
SHARED = ("embed_tokens.weight",)
_ORDER = {"q": 0, "k": 1, "v": 2, 0: 0, 1: 1, None: 0}  # of the shards in a fused parameter
_SHARDS: dict[str, set[str | int]] = {".qkv_proj.": {"q", "k", "v"}, ".gate_up_proj.": {0, 1}}


@dataclass(frozen=True)
class Home:
    """Where a tensor of the file lives in SGLang's model."""

    parameter: str
    shard: str | int | None


def find_home(name: str, parameters: dict[str, torch.nn.Parameter]) -> Home:
    """The parameter that ``name`` of a file belongs to. Raises :class:`SwapRefused`."""
    for old, new in _RENAMED:
        name = name.replace(old, new)
    for part, fused, shard in _FUSED:
        if part in name:
            candidate = name.replace(part, fused)
            for full in (candidate, f"model.{candidate}"):
                if full in parameters:
                    return Home(full, shard)
    for full in (name, f"model.{name}"):
        if full in parameters:
            return Home(full, None)
    raise SwapRefused(f"the running drafter has no parameter for '{name}'")


def is_weight(name: str) -> bool:
    return name not in _VOCABULARY and not name.endswith(SHARED)


def lacking(homes: Iterable[Home], parameters: Iterable[str]) -> str:
    """The first of these parameters that the homes do not fill; "" when they fill all."""
    shards: dict[str, set[str | int | None]] = {}
    for home in homes:
        shards.setdefault(home.parameter, set()).add(home.shard)
    for name in parameters:
        have = shards.get(name, set())
        fused = next((all_of for part, all_of in _SHARDS.items() if part in name), None)
        if not have or (fused is not None and None not in have and have != fused):
            return name
    return ""


def rows_in(
    homes: Mapping[str, Home], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, slice]]:
    """By name of the file: the parameter, and its rows that are this tensor; shards of a fused
    parameter lie in it one behind the other."""
    first: dict[str, int] = {}
    rows = {}
    for name in sorted(homes, key=lambda name: _ORDER[homes[name].shard]):
        where, count = homes[name].parameter, shapes[name][0]
        begin = first.get(where, 0)
        rows[name] = (where, slice(begin, begin + count))
        first[where] = begin + count
    return rows
