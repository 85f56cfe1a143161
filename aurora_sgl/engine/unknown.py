"""Drafters that run here and that no checkpoint describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aurora_sgl.drafter import architectures, served
from aurora_sgl.engine import clean

_SHARED = ("embed_tokens", "lm_head")  # may be the target's


def why(worker: Any, folder: Path) -> str:
    """Why the running drafter is not what its checkpoint says, or the checkpoint in ``folder`` none
    of ours; "" when all is well, as far as one sees.

    SGLang quantises a drafter like its target where nothing else is said, and a token map gives it
    a vocabulary that its checkpoint does not have.
    """
    if getattr(getattr(worker, "server_args", None), "speculative_token_map", None):
        return "--speculative-token-map gives it another vocabulary than its checkpoint has"
    if reason := _is_not_ours(folder):
        return reason
    model = worker.draft_worker.draft_runner.model
    for name, parameter in model.named_parameters():
        whole = parameter.is_floating_point() and parameter.element_size() >= 2
        if not whole and not any(part in name for part in _SHARED):
            kind = str(parameter.dtype).removeprefix("torch.")
            return (
                f"its weights are quantised ({name} is {kind}); --speculative-draft-model-"
                "quantization unquant keeps them as they are"
            )
    return ""


def _is_not_ours(folder: Path) -> str:
    """Looked at first: the drafter may be a part of a target of many gigabytes."""
    if not (folder / "config.json").exists():
        return ""
    try:
        if served.is_as_served(folder, architectures.read_config(folder)):
            return ""
    except Exception as error:  # a config.json of a make that nobody thought of
        return clean.text(f"{error}".splitlines()[0], 300)
    return (
        "SGLang does not compute from its checkpoint what it was trained to; aurora-sgl serve "
        "gives it a copy from which it does"
    )
