"""What a drafter looks like, and how that is written in a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora_sgl.errors import AuroraError

EAGLE = "LlamaForCausalLMEagle"
EAGLE3 = "LlamaForCausalLMEagle3"
ROPE_TYPES = ("default", "linear", "llama3")


def aux_layers_of(num_layers: int) -> tuple[int, int, int]:
    """The three layers whose *input* the target hands to an EAGLE3 drafter.

    These are SGLang's own default (``set_eagle3_layers_to_capture``, 0.5.21). Below seven layers
    that default names a layer twice, so three distinct ones are taken instead.
    Raises ``AuroraError`` for a target of fewer than four layers.
    """
    if num_layers < 4:
        raise AuroraError(f"EAGLE3 needs a target of at least 4 layers, this one has {num_layers}")
    if num_layers < 7:
        return (1, num_layers // 2, num_layers - 1)
    return (2, num_layers // 2, num_layers - 3)


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a one-layer EAGLE or EAGLE3 drafter."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int  # equal to vocab_size for EAGLE
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    rope: Mapping[str, Any] | None = None  # parameters of a scaled rope, as in rope_parameters
    aux_layers: tuple[int, ...] = ()  # EAGLE3: layers whose input is captured
    target_model: str = ""
    target_revision: str = ""

    def __post_init__(self) -> None:
        assert self.architecture in (EAGLE, EAGLE3), self.architecture
        assert self.num_heads % self.num_kv_heads == 0
        assert 0 < self.draft_vocab_size <= self.vocab_size
        assert self.is_eagle3 == bool(self.aux_layers)

    @property
    def is_eagle3(self) -> bool:
        return self.architecture == EAGLE3

    @property
    def feature_width(self) -> int:
        """Width of the target's features that one drafter row takes."""
        return self.hidden_size * max(1, len(self.aux_layers))

    def to_json(self) -> dict[str, Any]:
        """The ``config.json`` that an unmodified SGLang loads.

        SGLang adds one to ``eagle_aux_hidden_state_layer_ids``, so they are written less one.
        ``tie_word_embeddings`` must be false, or SGLang takes the target's embedding as lm_head.
        """
        rope = {"rope_type": "default", **(self.rope or {}), "rope_theta": self.rope_theta}
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "target_hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": 1,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": rope,
            "max_position_embeddings": self.max_positions,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "aurora": {
                "target_model": self.target_model,
                "target_revision": self.target_revision,
            },
        }
        if self.is_eagle3:
            config["draft_vocab_size"] = self.draft_vocab_size
            config["num_aux_hidden_states"] = len(self.aux_layers)
            config["eagle_config"] = {
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in self.aux_layers],
            }
        return config

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], *, target_layers: int = 0) -> DrafterConfig:
        """Read a drafter's ``config.json``, ours or one trained elsewhere.

        ``target_layers`` resolves the auxiliary layers of a config that does not name them.
        Raises ``AuroraError`` for a shape that is not supported.
        """
        architecture = (raw.get("architectures") or ["none"])[0]
        if architecture not in (EAGLE, EAGLE3):
            raise AuroraError(
                f"not a drafter: architecture {architecture}, expected {EAGLE} or {EAGLE3}"
            )
        _refuse_unsupported(raw)
        try:
            heads = int(raw["num_attention_heads"])
            hidden = int(raw["hidden_size"])
            vocab = int(raw["vocab_size"])
            rope_theta, rope = _rope_of(raw)
            aurora = raw.get("aurora") or {}
            is_eagle3 = architecture == EAGLE3
            return cls(
                architecture=architecture,
                hidden_size=hidden,
                intermediate_size=int(raw["intermediate_size"]),
                num_heads=heads,
                num_kv_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or hidden // heads),
                vocab_size=vocab,
                draft_vocab_size=int(raw.get("draft_vocab_size") or vocab) if is_eagle3 else vocab,
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope_theta=rope_theta,
                max_positions=int(raw.get("max_position_embeddings", 2048)),
                rope=rope,
                aux_layers=_aux_layers(raw, target_layers) if is_eagle3 else (),
                target_model=str(aurora.get("target_model", "")),
                target_revision=str(aurora.get("target_revision", "")),
            )
        except KeyError as missing:
            raise AuroraError(f"the drafter's config.json lacks {missing}") from None


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
    return DrafterConfig.from_json(raw, target_layers=target_layers)


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if int(raw.get("num_hidden_layers", 1)) != 1:
        raise AuroraError("only drafters of one layer are supported")
    if raw.get("tie_word_embeddings", True):
        raise AuroraError("the drafter's config.json must say tie_word_embeddings: false")
    eagle = raw.get("eagle_config") or {}
    for name in ("attention_bias", "bias", "norm_before_fc", "fc_norm", "norm_output"):
        if raw.get(name) or eagle.get(name):
            raise AuroraError(f"drafters with {name} are not supported")
    if int(raw.get("target_hidden_size", raw.get("hidden_size", 0))) != int(
        raw.get("hidden_size", 0)
    ):
        raise AuroraError("drafters of another hidden size than the target's are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise AuroraError("only drafters with silu activation are supported")


def _rope_of(raw: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise AuroraError(f"rope type {kind} is not supported in a drafter")
    return theta, None if kind == "default" else {**rope, "rope_type": kind}


def _aux_layers(raw: Mapping[str, Any], target_layers: int) -> tuple[int, ...]:
    eagle = raw.get("eagle_config") or {}
    ids = eagle.get("eagle_aux_hidden_state_layer_ids")
    if ids:
        return tuple(int(layer) + 1 for layer in ids)
    if target_layers:
        return aux_layers_of(target_layers)
    return (-1, -1, -1)  # not named; SGLang takes its default for the target
