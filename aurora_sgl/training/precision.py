"""In which precision a run computes."""

from __future__ import annotations

import torch

from aurora_sgl.machine import computes_bfloat16
from aurora_sgl.training.settings import TrainSettings


def can_autocast(settings: TrainSettings, device: torch.device) -> bool:
    """Whether to compute in bfloat16: where that is asked for and the device does it itself."""
    return settings.autocast and computes_bfloat16(device.type)
