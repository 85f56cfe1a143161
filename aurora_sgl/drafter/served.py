"""The folder that SGLang is given for a drafter: the drafter's own where SGLang computes from it
what the drafter was trained to, else a copy that says so in SGLang's words.

SGLang 0.5.23 chooses the class by ``architectures`` (published drafters name the target's), reads
``bias`` as one of the attention, takes the target's lm_head without ``draft_vocab_size``, leaves a
tensor that a file lacks as PyTorch drew it, and ends when a drafter's positions do not go as far as
the target's (model_config.py, llama.py, llama_eagle3.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from aurora_sgl import atomic
from aurora_sgl.drafter import architectures, checkpoint, weights
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.json_fields import mapping, number
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.private import OWNER

#: Where SGLang looks for the length of a model, in this order (``get_context_length``, 0.5.23).
_LENGTHS = (
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "model_max_length",
    "max_position_embeddings",
)
_DEFAULT_LENGTH = 2048


def context_length(raw: Mapping[str, Any]) -> int:
    """Tokens that SGLang lets a model have, by its ``config.json``. Raises ``AuroraError`` where it
    says no number."""
    name = next((name for name in _LENGTHS if raw.get(name) is not None), _LENGTHS[-1])
    return int(_stretch(raw) * number(raw, name, _DEFAULT_LENGTH))


def _stretch(raw: Mapping[str, Any]) -> float:
    """What SGLang multiplies the positions of a scaled rope with."""
    rope = mapping(raw, "rope_parameters" if raw.get("rope_parameters") else "rope_scaling")
    if "original_max_position_embeddings" in rope or rope.get("rope_type") == "llama3":
        return 1.0
    return number(rope, "factor", 1.0)


def is_as_served(folder: Path, config: DrafterConfig) -> bool:
    """Whether SGLang computes from the folder what the drafter was trained to."""
    raw = architectures.read_json(folder)
    return _words(raw, config, 0) == raw and _is_complete(folder, config)


def tensors_of(folder: Path, config: DrafterConfig) -> dict[str, torch.Tensor]:
    """The drafter's own tensors of a folder, without the target's that lie beside them, and those
    that it may leave out though SGLang has them."""
    kind = architectures.named(config.architecture)
    own = {
        name: tensor
        for name, tensor in weights.read_tensors(folder).items()
        if kind.parameter_name(weights.canonical_name(name)) is not None
    }
    ours = {weights.canonical_name(name): tensor for name, tensor in own.items()}
    return {**own, **kind.left_out(ours, config)}


@contextmanager
def as_stored(folder: Path, config: DrafterConfig) -> Iterator[Path]:
    """A folder as a version is kept: the given one, or a copy for a while. Raises ``AuroraError``
    as ``weights.read_tensors`` does."""
    if weights.is_one_file(folder) and is_as_served(folder, config):
        yield folder
        return
    with TemporaryDirectory(prefix="aurora-sgl-convert-") as scratch:
        words = _words(architectures.read_json(folder), config, 0)
        _write(Path(scratch), words, tensors_of(folder, config))
        yield Path(scratch)


def folder_for(folder: Path, config: DrafterConfig, length: int, into: Path) -> Path:
    """A folder that SGLang serves as far as ``length`` positions: the given one, or a copy in
    ``into``, which is made once, with the weights in one file, whose hash a server can tell.

    Raises ``AuroraError`` when the disk does not take it.
    """
    raw = architectures.read_json(folder)
    words = _words(raw, config, length)
    if words == raw and weights.is_one_file(folder) and _is_complete(folder, config):
        return folder
    tensors = tensors_of(folder, config)
    sha256 = checkpoint.content_sha256(tensors)
    name = sha256_bytes(f"{sha256}|{json.dumps(words, sort_keys=True)}".encode())[:16]
    copy = into / f"served-{name}"
    if not (copy / "config.json").exists():
        try:
            into.mkdir(mode=OWNER.folder, parents=True, exist_ok=True)
            with atomic.written(copy) as new:
                new.mkdir(mode=OWNER.folder)
                _write(new, words, tensors)
        except (OSError, SafetensorError) as error:
            raise AuroraError(f"cannot write the drafter to {copy}: {error}") from None
    return copy


def _words(raw: dict[str, Any], config: DrafterConfig, length: int) -> dict[str, Any]:
    """``config.json`` for SGLang; ``raw`` as it is where nothing has to change."""
    words = {**raw, "architectures": [config.architecture]}
    if words.get("bias"):  # of fc, which SGLang's class has anyway
        del words["bias"]
    if architectures.named(config.architecture).has_own_head and not raw.get("draft_vocab_size"):
        words["draft_vocab_size"] = config.draft_vocab_size
    if context_length(raw) < length:
        words = {name: value for name, value in words.items() if name not in _LENGTHS}
        words["max_position_embeddings"] = math.ceil(length / _stretch(raw))
    return words


def _is_complete(folder: Path, config: DrafterConfig) -> bool:
    """Whether it has all of the drafter's tensors and none of the target's."""
    names = dict.fromkeys(weights.shapes_in(folder), torch.empty(0))
    kind = architectures.named(config.architecture)
    others = any(kind.parameter_name(name) is None for name in names)
    return not others and not kind.left_out(names, config)


def _write(folder: Path, words: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, str(folder / weights.WEIGHTS), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(words, indent=2, sort_keys=True) + "\n")
    for one in folder.iterdir():
        one.chmod(OWNER.file)
