"""The drafter architectures: one module each, behind a table keyed by ``architectures[0]``.

What differs between them is asked of :class:`~aurora_sgl.drafter.model.Drafter`'s methods and
flags, never of a name (held by tests/unit/drafter/test_architectures.py). The other modules of this
package hold what several of them share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aurora_sgl.drafter import weights
from aurora_sgl.drafter.architectures.eagle import Eagle
from aurora_sgl.drafter.architectures.eagle3 import Eagle3
from aurora_sgl.drafter.config import DrafterConfig, config_json, shared_fields
from aurora_sgl.drafter.json_fields import shown
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.errors import AuroraError

#: By the name in ``config.json``. The first one is what an untrained drafter gets.
ARCHITECTURES: dict[str, type[Drafter]] = {one.architecture: one for one in (Eagle3, Eagle)}
DEFAULT = Eagle3.architecture
#: What published drafters name in its place. Which of ours one is, its tensors say.
TARGETS_CLASS = "LlamaForCausalLM"


def named(architecture: str) -> type[Drafter]:
    """Raises ``AuroraError`` for an architecture that is not in the table."""
    if architecture not in ARCHITECTURES:
        raise AuroraError(
            f"not a drafter: architecture {shown(architecture)}, expected "
            f"{' or '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture]


def build(config: DrafterConfig) -> Drafter:
    """A drafter of this shape; its weights are what PyTorch begins with."""
    return named(config.architecture)(config)


def has_algorithm(name: str) -> bool:
    """Whether one of them is served under this ``--speculative-algorithm``."""
    return name.upper() in {kind.algorithm for kind in ARCHITECTURES.values()}


def from_json(
    raw: Mapping[str, Any],
    *,
    target_layers: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> DrafterConfig:
    """Read a drafter's ``config.json``, ours or one trained elsewhere.

    ``target_layers`` resolves what a config leaves to the target's depth; ``shapes``, those of its
    tensors, which architecture one is that names the target's class.
    Raises ``AuroraError`` for a shape that is not supported.
    """
    kind = _kind(_name_in(raw), shapes or {})
    try:
        kind.check_json(raw)
        return DrafterConfig(
            architecture=kind.architecture,
            **shared_fields(raw),
            **kind.fields_from_json(raw, target_layers),
        )
    except KeyError as missing:
        raise AuroraError(f"the drafter's config.json lacks {missing}") from None


def _name_in(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "none"


def _kind(name: str, shapes: Mapping[str, tuple[int, ...]]) -> type[Drafter]:
    if name == TARGETS_CLASS:
        for kind in ARCHITECTURES.values():
            if kind.has_written(shapes):
                return kind
    return named(name)


def to_json(config: DrafterConfig) -> dict[str, Any]:
    """The ``config.json`` that an unmodified SGLang loads."""
    return {**config_json(config), **named(config.architecture).fields_to_json(config)}


def read_config(folder: Path, *, target_layers: int = 0) -> DrafterConfig:
    """``config.json`` of a drafter folder. Raises ``AuroraError`` when it cannot be read."""
    raw = read_json(folder)
    shapes = weights.shapes_in(folder) if _name_in(raw) == TARGETS_CLASS else None
    return from_json(raw, target_layers=target_layers, shapes=shapes)


def read_json(folder: Path) -> dict[str, Any]:
    """The same as it stands there. Raises ``AuroraError`` when it is no JSON object."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise AuroraError(f"no config.json in {folder}: not a drafter folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AuroraError(f"cannot read {path}: {error}") from None
    if not isinstance(raw, dict):
        raise AuroraError(f"{path} holds no JSON object")
    return raw
