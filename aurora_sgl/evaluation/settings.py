"""How versions are replayed and compared: one field a knob."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.sequences.splits import GATE_SHARE


class EvaluationSettings(BaseModel):
    """The part of a recipe that says what is replayed, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int = Field(default=4, ge=1)
    """Depth of the drafts that are replayed: the served one."""

    topk: int = Field(default=4, ge=1)
    """Top-k of the replayed drafts."""

    nodes: int = Field(default=16, ge=2)
    """Nodes of the replayed drafts, the root counted."""

    served_dtype: str = "bfloat16"
    """Dtype in which the server runs the drafter."""

    gate_share: float = Field(default=GATE_SHARE, ge=0, lt=1)
    """Share of conversations that no run ever trains on: the evidence of the gate."""

    min_gate_requests: int = Field(default=4, ge=1)
    """Fewest gate requests for a verdict; with fewer it is inconclusive."""

    seed: int = 0
    """Seed of the order of requests, and of the resamples of intervals."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where training and the gate's replay run; auto: the GPU when there is one."""

    @model_validator(mode="after")
    def _can_be_drafted(self) -> Self:
        _ = self.shape  # raises ValueError for one that no server can draft
        return self

    @property
    def shape(self) -> DraftShape:
        return DraftShape(self.depth, self.topk, self.nodes if self.topk > 1 else self.depth + 1)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
