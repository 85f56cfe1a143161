"""Which requests may be learned from, and which never are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aurora_sgl.hashing import sha256_bytes

#: Sampling parameters that change the target's logits, with the value that leaves them alone.
#: SGLang applies them in place, and relaxes penalties under speculation: what was emitted is then
#: not what the captured hidden states say.
_NEUTRAL: Mapping[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}
_CONSTRAINTS = (
    "logit_bias",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "grammar",
    "custom_logit_processor",
    "custom_params",
)


def is_plain(sampling: Mapping[str, Any]) -> bool:
    """Whether a request was answered by the target alone: no penalty, bias or grammar."""
    if any(sampling.get(name) for name in _CONSTRAINTS):
        return False
    return all(
        sampling.get(name) is None or float(sampling[name]) == neutral
        for name, neutral in _NEUTRAL.items()
    )


def split_of(key: str, *, dev_share: float, gate_share: float) -> str:
    """``train``, ``dev`` or ``gate``: fixed by the key alone, so a request never changes sides.

    The key is a conversation's hash, or the hash of the prompt, so that two requests of one
    conversation and two copies of one prompt land on the same side. The gate is cut off first:
    its requests stay held out whatever the dev share.
    """
    place = int(sha256_bytes(f"split:{key}".encode())[:8], 16) / 0x1_0000_0000
    if place < gate_share:
        return "gate"
    return "dev" if place < gate_share + dev_share else "train"
