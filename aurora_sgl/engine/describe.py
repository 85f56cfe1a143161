"""What a server tells the sidecar about itself."""

from __future__ import annotations

import socket
from typing import Any

from aurora_sgl import environment
from aurora_sgl.config import get_settings


def describe_worker(worker: Any) -> tuple[dict[str, Any], bool]:
    """(description, whether this rank leads its tensor-parallel group).

    The description goes into every ``Hello``; its keys are what the store's ``server`` and
    ``deployment_group`` rows are made from.
    """
    import sglang
    from sglang.srt.runtime_context import get_parallel

    args = worker.server_args
    parallel = get_parallel()
    runner = worker.target_worker.model_runner
    drafter = worker.draft_worker.draft_runner
    description = {
        **identity(args, parallel),
        "sglang_version": sglang.__version__,
        "target_model": str(runner.model_config.model_path),
        "target_revision": str(getattr(runner.model_config, "revision", None) or ""),
        "target_vocab_size": int(runner.model_config.vocab_size),
        "target_hidden_size": int(runner.model_config.hidden_size),
        "target_num_layers": int(runner.model_config.num_hidden_layers),
        "aux_layers": _aux_layers(runner.model_config, drafter.model_config),
        "drafter_source": environment.value(environment.DRAFTER_SOURCE),
        "drafter_path": _drafter_folder(args),
        "draft_architecture": type(drafter.model).__name__,
        "algorithm": str(_value(args, "speculative_algorithm", "")),
        "depth": int(worker.speculative_num_steps),
        "topk": int(worker.topk),
        "nodes": int(worker.speculative_num_draft_tokens),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "device": str(worker.device),
        "tp_size": int(getattr(parallel, "tp_size", 1)),
        "rejection_sampling": bool(_value(args, "speculative_use_rejection_sampling", False)),
        "sampled_rule": _sampled_rule(args),
        # On CUDA every step carries drafts: a verify graph is captured for the full tree, and
        # without graphs some backends take a step's width from the start of the server.
        "plain_steps_possible": str(worker.device) == "cpu"
        and not _value(args, "speculative_adaptive", False),
    }
    return description, int(getattr(parallel, "attn_tp_rank", 0)) == 0


def identity(args: Any, parallel: Any) -> dict[str, Any]:
    """Which server, of which group: what the sidecar registers it by."""
    settings = get_settings()
    name = settings.server_name or f"{socket.gethostname()}:{_value(args, 'port', 0)}"
    dp_rank = _replica(parallel)
    return {
        "name": name if not dp_rank else f"{name}/dp{dp_rank}",
        "group": settings.group,
        "dp_rank": dp_rank,
    }


def _replica(parallel: Any) -> int:
    """Which replica this is: of plain data parallelism, whose replicas know nothing of each other
    and each have rank 0 of their own attention, or of DP attention."""
    replica = getattr(parallel, "dp_rank", None)
    return int(getattr(parallel, "attn_dp_rank", 0) or 0 if replica is None else replica)


def _drafter_folder(args: Any) -> str:
    """Where the drafter lies, also one that was given by its name on the hub."""
    from aurora_sgl.drafter import hub

    place = str(_value(args, "speculative_draft_model_path", "") or "")
    if not place:
        return ""
    revision = _value(args, "speculative_draft_model_revision", None)
    return str(hub.local(place, revision=revision, cache=_value(args, "download_dir", None)))


def _aux_layers(target: Any, drafter: Any) -> list[int]:
    """Layers whose outputs feed the drafter: from its config, else SGLang's choice."""
    config = getattr(drafter.hf_config, "eagle_config", None) or {}
    chosen = config.get("eagle_aux_hidden_state_layer_ids")
    layers = int(target.num_hidden_layers)
    return [int(layer) for layer in chosen] if chosen else [1, layers // 2 - 1, layers - 4]


def _value(args: Any, name: str, default: Any) -> Any:
    return getattr(args, name, default)


def _sampled_rule(args: Any) -> str:
    """By which rule drafts of sampled requests are accepted, see ``wire.VerifyStep``."""
    if not _value(args, "speculative_use_rejection_sampling", False):
        return "target_sampling"
    by_block = _value(args, "speculative_use_block_verification", False)
    return "block_verification" if by_block else "rejection_sampling"
