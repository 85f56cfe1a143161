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

from aurora_sgl.drafter.architectures.eagle import Eagle
from aurora_sgl.drafter.architectures.eagle3 import Eagle3
from aurora_sgl.drafter.config import DrafterConfig, config_json, shared_fields
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.errors import AuroraError

#: By the name in ``config.json``. The first one is what an untrained drafter gets.
ARCHITECTURES: dict[str, type[Drafter]] = {one.architecture: one for one in (Eagle3, Eagle)}
DEFAULT = Eagle3.architecture


def named(architecture: str) -> type[Drafter]:
    """Raises ``AuroraError`` for an architecture that is not in the table."""
    if architecture not in ARCHITECTURES:
        raise AuroraError(
            f"not a drafter: architecture {architecture}, expected {' or '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture]


def build(config: DrafterConfig) -> Drafter:
    """A drafter of this shape; its weights are what PyTorch begins with."""
    return named(config.architecture)(config)


def has_algorithm(name: str) -> bool:
    """Whether one of them is served under this ``--speculative-algorithm``."""
    return name.upper() in {kind.algorithm for kind in ARCHITECTURES.values()}


def from_json(raw: Mapping[str, Any], *, target_layers: int = 0) -> DrafterConfig:
    """Read a drafter's ``config.json``, ours or one trained elsewhere.

    ``target_layers`` resolves what a config leaves to the target's depth.
    Raises ``AuroraError`` for a shape that is not supported.
    """
    kind = named((raw.get("architectures") or ["none"])[0])
    kind.check_json(raw)
    try:
        return DrafterConfig(**shared_fields(raw), **kind.fields_from_json(raw, target_layers))
    except KeyError as missing:
        raise AuroraError(f"the drafter's config.json lacks {missing}") from None


def to_json(config: DrafterConfig) -> dict[str, Any]:
    """The ``config.json`` that an unmodified SGLang loads."""
    return {**config_json(config), **named(config.architecture).fields_to_json(config)}


def read_config(folder: Path, *, target_layers: int = 0) -> DrafterConfig:
    """``config.json`` of a drafter folder. Raises ``AuroraError`` when it cannot be read."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise AuroraError(f"no config.json in {folder}: not a drafter folder") from None
    except (OSError, ValueError) as error:
        raise AuroraError(f"cannot read {path}: {error}") from None
    if not isinstance(raw, dict):
        raise AuroraError(f"{path} holds no JSON object")
    return from_json(raw, target_layers=target_layers)
