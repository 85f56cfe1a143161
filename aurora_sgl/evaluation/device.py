"""Where a replay or a run computes, and in which precision its drafter will serve."""

from __future__ import annotations

import copy

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.errors import AuroraError
from aurora_sgl.evaluation.settings import EvaluationSettings
from aurora_sgl.machine import computes_bfloat16


def device_of(settings: EvaluationSettings) -> torch.device:
    """Raises ``AuroraError`` when a GPU is asked for that is not there."""
    if settings.device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(settings.device)
    if device.type != "cuda":
        return device
    index = device.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise AuroraError(f"there is no GPU {settings.device} for training: use device=cpu")
    return torch.device("cuda", index)


def served_dtype(settings: EvaluationSettings) -> torch.dtype:
    """Raises ``AuroraError`` for a name that is not a floating-point dtype of a server."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if settings.served_dtype not in dtypes:
        raise AuroraError(f"unknown dtype {settings.served_dtype}: use one of {', '.join(dtypes)}")
    return dtypes[settings.served_dtype]


def as_served(drafter: Drafter, settings: EvaluationSettings) -> Drafter:
    """A copy where replays run, with weights in the served precision.

    A CPU that has no bfloat16 products computes with these weights in float32: a server's kernels
    add products up in float32 too, and PyTorch's bfloat16 takes five times as long there. Raises
    ``AuroraError`` as :func:`served_dtype` and :func:`device_of` do.
    """
    dtype, device = served_dtype(settings), device_of(settings)
    served = copy.deepcopy(drafter).to(device, dtype).eval()
    slow = dtype == torch.bfloat16 and not computes_bfloat16(device.type)
    return served.float() if slow else served
