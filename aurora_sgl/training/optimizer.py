"""What turns a gradient into a step: AdamW, or Muon for the matrices of the layer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) steps along the orthogonalised
momentum, which is for matrices between hidden states; the head and the vectors stay with AdamW. Its
steps are scaled to the size of AdamW's ("match_rms_adamw", arXiv 2502.16982), so one rate serves
both.
"""

from __future__ import annotations

from typing import Any

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.errors import AuroraError
from aurora_sgl.training.precision import can_autocast
from aurora_sgl.training.settings import TrainSettings


class Optimizer:
    """The optimizers of one drafter, as one. Raises ``AuroraError`` for Muon on a device that does
    not multiply bfloat16 itself: PyTorch's orthogonalises in bfloat16 (2.13), and one step of the
    demo's drafter took more than 30 s of an Ice Lake core."""

    def __init__(self, drafter: Drafter, settings: TrainSettings) -> None:
        if settings.optimizer == "muon" and not can_autocast(settings, drafter.device):
            raise AuroraError(
                "optimizer=muon needs autocast and a device that multiplies bfloat16: use adamw"
            )
        named = list(drafter.named_parameters())
        inner = [p for name, p in named if p.ndim == 2 and not name.startswith("lm_head")]
        with_muon = {id(p) for p in inner} if settings.optimizer == "muon" else set()
        rest = [p for _, p in named if id(p) not in with_muon]
        self.peak = settings.learning_rate
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [
                    {
                        "params": [p for p in rest if p.ndim > 1],
                        "weight_decay": settings.weight_decay,
                    },
                    {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
                ],
                lr=settings.learning_rate,
                betas=settings.betas,
                fused=True,
            )
        ]
        if with_muon:
            self.parts.append(
                torch.optim.Muon(
                    inner,
                    lr=settings.learning_rate,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """One step at this share of the peak rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.peak * rate
            part.step()

    def state(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load(self, state: list[dict[str, Any]]) -> None:
        for part, own in zip(self.parts, state, strict=True):
            part.load_state_dict(own)
