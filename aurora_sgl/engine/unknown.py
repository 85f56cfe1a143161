"""Drafters that run here and that no checkpoint describes."""

from __future__ import annotations

from typing import Any

_SHARED = ("embed_tokens", "lm_head")  # may be the target's


def why(worker: Any) -> str:
    """Why the running drafter is not what its checkpoint says; "" when it is, as far as one sees.

    SGLang quantises a drafter like its target where nothing else is said, and a token map gives it
    a vocabulary that its checkpoint does not have.
    """
    if getattr(getattr(worker, "server_args", None), "speculative_token_map", None):
        return "--speculative-token-map gives it another vocabulary than its checkpoint has"
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
