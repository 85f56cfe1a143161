"""The weights in a drafter folder: which files they are, and what these hold.

Safetensors only, in one file or in shards. A pickle can run code in whoever reads it, so it is
never read here: ``drafter.convert`` does that in a process of its own.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from aurora_sgl.errors import AuroraError

WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"
#: The file that says which shard holds which tensor.
INDEX = ".index.json"


def canonical_name(name: str) -> str:
    """One name for what published checkpoints, ours and SGLang's modules call differently."""
    name = name.removeprefix("model.")
    return "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a drafter folder, less the target's embedding: of ``model.safetensors``, or of
    the shards that an index names or that lie there.

    Raises ``AuroraError`` when a file is missing, cut short, a pickle, or none of these.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _files(Path(folder)):
        with _opened(path) as file:
            for name in _names(file):
                tensors[name] = file.get_tensor(name)
    return tensors


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the same tensors by canonical name, from the heads of the files alone. Raises as
    :func:`read_tensors` does."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(Path(folder)):
        with _opened(path) as file:
            for name in _names(file):
                shapes[canonical_name(name)] = tuple(file.get_slice(name).get_shape())
    return shapes


def is_one_file(folder: Path) -> bool:
    return (Path(folder) / WEIGHTS).exists()


def shards(folder: Path, name: str) -> list[Path]:
    """The files that the index of ``name`` names; an empty list without an index."""
    index = folder / f"{name}{INDEX}"
    if not index.exists():
        return []
    try:
        named = json.loads(index.read_text())["weight_map"].values()
        return [folder / Path(part).name for part in sorted(set(named))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise AuroraError(f"cannot read {index}: {error}") from None


def _files(folder: Path) -> list[Path]:
    if is_one_file(folder):
        return [folder / WEIGHTS]
    if files := shards(folder, WEIGHTS) or sorted(folder.glob("*.safetensors")):
        return files
    if (folder / PICKLE).exists() or (folder / f"{PICKLE}{INDEX}").exists():
        raise AuroraError(
            f"the weights in {folder} are a pickle ({PICKLE}), which could run code here; convert "
            "them in a process of its own that runs none: aurora-sgl versions convert "
            f"{shlex.quote(str(folder))} NEW_FOLDER"
        )
    raise AuroraError(f"no {WEIGHTS} in {folder}: not a drafter folder")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise AuroraError(f"{path} is missing: the index beside it names it") from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AuroraError(f"{path} is broken or cut short: {why}") from None


def _names(file: Any) -> list[str]:
    return [name for name in file.keys() if "embed_tokens" not in name]  # noqa: SIM118
