"""The few things of a target model that a drafter needs: its embedding and its lm_head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from aurora_sgl.drafter import hub
from aurora_sgl.drafter.json_fields import shown, whole
from aurora_sgl.errors import AuroraError

#: Targets whose SGLang class captures EAGLE3's auxiliary layers and names its tensors like Llama
#: (``set_eagle3_layers_to_capture`` in SGLang 0.5.21: models/llama.py, qwen2.py, qwen3.py ...).
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3")

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class TargetInfo:
    """Shape of a target model."""

    model: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    model_type: str
    raw: Mapping[str, Any]  # the whole config.json
    revision: str = ""


def read_target(folder: Path, *, model: str = "", revision: str = "") -> TargetInfo:
    """``config.json`` of a target folder, or of a name on the hub that was downloaded before.

    Raises ``AuroraError`` when it is not one we serve.
    """
    path = hub.local(folder, revision=revision or None) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise AuroraError(f"no model at {folder}: config.json is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AuroraError(f"cannot read {path}: {error}") from None
    if not isinstance(raw, dict):
        raise AuroraError(f"{path} holds no JSON object")
    kind = str(raw.get("model_type", "unknown"))
    if kind not in LLAMA_FAMILY:
        raise AuroraError(
            f"{folder} is a {shown(kind)} model; drafters are made for {', '.join(LLAMA_FAMILY)}"
        )
    try:
        return TargetInfo(
            model=model or str(folder),
            hidden_size=whole(raw, "hidden_size"),
            vocab_size=whole(raw, "vocab_size", most=1 << 24),
            num_layers=whole(raw, "num_hidden_layers"),
            model_type=kind,
            raw=raw,
            revision=revision,
        )
    except KeyError as missing:
        raise AuroraError(f"{path} lacks {missing}") from None


class TargetHead:
    """Embedding and lm_head of a target folder (safetensors, one file or many, tied or not).

    Only these two tensors are read, and kept in the dtype of the file.
    """

    def __init__(self, embedding: torch.Tensor, lm_head: torch.Tensor) -> None:
        assert embedding.shape == lm_head.shape, (embedding.shape, lm_head.shape)
        self.embedding = embedding  # [vocab, H]
        self.lm_head = lm_head  # [vocab, H]; the same storage when tied

    @classmethod
    def load(cls, folder: Path) -> TargetHead:
        """Raises ``AuroraError`` when a tensor or a file is missing or broken."""
        info = read_target(folder)
        embedding = _read_tensor(Path(folder), _EMBEDDING)
        tied = bool(info.raw.get("tie_word_embeddings", False))
        lm_head = embedding if tied else _read_tensor(Path(folder), _HEAD)
        return cls(embedding[: info.vocab_size], lm_head[: info.vocab_size])

    def to(self, device: torch.device) -> TargetHead:
        """The same tensors on another device; this object when they are there already."""
        if self.embedding.device == device:
            return self
        embedding = self.embedding.to(device)
        tied = self.lm_head.data_ptr() == self.embedding.data_ptr()
        return TargetHead(embedding, embedding if tied else self.lm_head.to(device))

    def embed(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # [..., H]
        return self.embedding[tokens].to(dtype)

    @cached_property
    def wide_lm_head(self) -> torch.Tensor:  # [vocab, H] float32
        return self.lm_head.float()


def _read_tensor(folder: Path, name: str) -> torch.Tensor:
    folder = hub.local(folder)
    path = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
        if name not in files:
            raise AuroraError(f"{index} names no {name}")
        path = folder / files[name]
    try:
        with safe_open(str(path), framework="pt") as file:
            tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise AuroraError(f"cannot read {name} from {path}: {error}") from None
    assert isinstance(tensor, torch.Tensor)
    return tensor
