"""Drafters as Hugging Face folders (``config.json``, ``model.safetensors``) that SGLang loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from aurora_sgl import atomic
from aurora_sgl.drafter import architectures, vocabulary
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.drafter.json_fields import shown
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetInfo
from aurora_sgl.drafter.weights import WEIGHTS, canonical_name, read_tensors
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_bytes

_VOCABULARY = ("d2t", "t2d")
#: Kinds of weights that SGLang and training take as they are.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def content_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """``weights_sha256``: SHA-256 over sorted canonical names, dtypes, shapes and raw bytes.

    The embedding is left out (it is the target's); ``d2t`` and ``t2d`` are part of it.
    """
    digest = hashlib.sha256()
    named = {canonical_name(name): t for name, t in tensors.items() if "embed_tokens" not in name}
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        head = f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{list(tensor.shape)}|"
        digest.update(head.encode())
        # A view, not a copy: hashing then runs without the interpreter lock.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def vocab_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of ``d2t`` as int64; of the word ``full`` for a drafter of the whole vocabulary."""
    if _without_maps(tensors):
        return sha256_bytes(b"full")
    return sha256_bytes(tensors["d2t"].detach().cpu().to(torch.int64).numpy().tobytes())


def _without_maps(tensors: Mapping[str, torch.Tensor]) -> bool:
    return "d2t" not in tensors


def tensors_of(drafter: Drafter, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The tensors that :func:`save` writes: weights in ``dtype``, vocabulary maps as they are.

    A drafter of the whole vocabulary that came without maps goes without them: SGLang looks tokens
    up in them where they are, and a swap can't begin or end that.
    """
    return {
        name: (tensor if name in _VOCABULARY else tensor.to(dtype)).detach().cpu().contiguous()
        for name, tensor in drafter.state_dict().items()
        if not (name in _VOCABULARY and drafter.without_maps)
    }


def save(drafter: Drafter, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a drafter folder beside its place and rename it there. An older one is replaced.

    Raises ``AuroraError`` when the disk does not take it; nothing half-written stays behind.
    """
    folder = Path(folder)
    config = {**architectures.to_json(drafter.config), "dtype": str(dtype).removeprefix("torch.")}
    try:
        with atomic.written(folder) as new:
            new.mkdir()
            (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_file(tensors_of(drafter, dtype), str(new / WEIGHTS), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise AuroraError(f"cannot write the drafter to {folder}: {error}") from None
    return folder


def load(folder: Path, *, dtype: torch.dtype = torch.float32, target_layers: int = 0) -> Drafter:
    """A drafter from its folder. Raises ``AuroraError`` when a key or a shape is wrong."""
    config = architectures.read_config(folder, target_layers=target_layers)
    in_file = read_tensors(folder)
    tensors = _own_names(in_file, config)
    problems = _shape_problems(tensors, config)
    if problems:
        raise AuroraError(f"{folder}: {problems[0]}")
    with torch.device("meta"):
        drafter = architectures.build(config)
    state = {n: t if n in _VOCABULARY else t.to(dtype) for n, t in tensors.items()}
    drafter.load_state_dict(state, assign=True)
    drafter.without_maps = _without_maps(in_file)
    drafter.after_load()
    return drafter.requires_grad_(True)


def validate(folder: Path, target: TargetInfo | None = None) -> list[str]:
    """Why a drafter folder must not go live, one line a reason; empty when it may.

    Looks at the configuration, keys, shapes, dtypes, finiteness, the vocabulary maps and, when
    given, the target that it must fit.
    """
    try:
        config = architectures.read_config(folder, target_layers=target.num_layers if target else 0)
        tensors = _own_names(read_tensors(folder), config)
    except AuroraError as error:
        return [str(error)]
    problems = _shape_problems(tensors, config)
    for name, tensor in tensors.items():
        if name in _VOCABULARY:
            continue
        if tensor.dtype not in _DTYPES:
            problems.append(f"{shown(name)} is {tensor.dtype}, not a floating-point tensor")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{shown(name)} holds values that are not finite")
    if not problems and architectures.named(config.architecture).has_draft_vocabulary:
        problems += vocabulary.problems(tensors["d2t"], tensors["t2d"])
    return problems + (_target_problems(config, target) if target else [])


def _own_names(
    tensors: Mapping[str, torch.Tensor], config: DrafterConfig
) -> dict[str, torch.Tensor]:
    kind = architectures.named(config.architecture)
    named = ((kind.parameter_name(canonical_name(name)), t) for name, t in tensors.items())
    return kind.complete({name: tensor for name, tensor in named if name is not None}, config)


def _shape_problems(tensors: Mapping[str, torch.Tensor], config: DrafterConfig) -> list[str]:
    with torch.device("meta"):
        expected = architectures.build(config).state_dict()
    problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    unknown = sorted(tensors.keys() - expected.keys())
    problems += [f"tensor {shown(name)} is unknown" for name in unknown]
    for name in sorted(expected.keys() & tensors.keys()):
        have, want = list(tensors[name].shape), list(expected[name].shape)
        if have != want:
            problems.append(f"tensor {name} has shape {have}, expected {want}")
    return problems


def _target_problems(config: DrafterConfig, target: TargetInfo) -> list[str]:
    problems = []
    if config.hidden_size != target.hidden_size:
        problems.append(
            f"made for a target of hidden size {config.hidden_size}, {target.model} has "
            f"{target.hidden_size}"
        )
    if config.vocab_size != target.vocab_size:
        problems.append(
            f"made for a vocabulary of {config.vocab_size}, {target.model} has {target.vocab_size}"
        )
    return problems + architectures.named(config.architecture).target_problems(config, target)


__all__ = [
    "WEIGHTS",
    "canonical_name",
    "content_sha256",
    "load",
    "read_tensors",
    "save",
    "tensors_of",
    "validate",
    "vocab_sha256",
]
