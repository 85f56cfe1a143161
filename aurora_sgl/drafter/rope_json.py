"""The rotary positions that a ``config.json`` asks for, checked before anything computes with them.

SGLang fills in what a scaled rope leaves out, with a line in its log, and serves other arithmetic
than the drafter was trained with; transformers refuses some of it when the server is half started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aurora_sgl.drafter.json_fields import mapping, number, shown, whole, wrong
from aurora_sgl.errors import AuroraError

#: Kinds that ``drafter.rope`` computes, and the numbers that each needs.
NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ORIGINAL = "original_max_position_embeddings"
_MOST_POSITIONS = 1 << 40
#: Variants that SGLang knows for a plain rope too and that are not written here.
_VARIANTS = ("mrope_section", "use_fope")


def read(raw: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """``rope_theta``, and the parameters of a scaled rope; None for a plain one.

    Raises ``AuroraError`` for a kind that is not supported, and for a field of it that is missing
    or no number.
    """
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = mapping(raw, name)
    theta = number(rope, "rope_theta", number(raw, "rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise wrong(f"{name}.rope_type", kind, "one of " + ", ".join(NEEDS))
    if kind not in NEEDS:
        raise AuroraError(f"rope type {shown(kind, 40)} is not supported in a drafter")
    _refuse_variants(raw, rope)
    if kind == "default":
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise AuroraError("a rope for each kind of layer is not supported in a drafter")
        return theta, None
    return theta, _scaled(raw, rope, kind, name)


def _refuse_variants(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    for variant in _VARIANTS:
        if rope.get(variant):
            raise AuroraError(f"a rope with {variant} is not supported in a drafter")
    for place in (raw, rope):
        if number(place, "partial_rotary_factor", 1.0) != 1.0:
            raise AuroraError("a rope over a part of a head is not supported in a drafter")


def _scaled(
    raw: Mapping[str, Any], rope: Mapping[str, Any], kind: str, name: str
) -> Mapping[str, Any]:
    try:
        fields: dict[str, Any] = {each: number(rope, each) for each in NEEDS[kind]}
        if kind == "llama3":
            fields[_ORIGINAL] = _original_positions(raw, rope)
    except KeyError as missing:
        raise AuroraError(
            f"config.json: {name} of type {kind} lacks {missing}; SGLang would guess it"
        ) from None
    if kind == "llama3" and fields["high_freq_factor"] < fields["low_freq_factor"]:
        raise AuroraError(f"config.json: {name} has high_freq_factor below low_freq_factor")
    return {**_others(rope), **fields, "rope_type": kind}


def _original_positions(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """SGLang takes the one beside the rope where both are there (models/llama.py, 0.5.23)."""
    if raw.get(_ORIGINAL) is not None:
        return whole(raw, _ORIGINAL, most=_MOST_POSITIONS)
    return whole(rope, _ORIGINAL, most=_MOST_POSITIONS)


def _others(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
