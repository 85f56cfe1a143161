"""The recipe of a training run: one field a knob."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aurora_sgl.training.objectives import NAMES
from aurora_sgl.training.replay import DraftShape


class TrainSettings(BaseModel):
    """One recipe. What the defaults rest on is said beside each knob."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: str = "forward_kl"
    """What is made small: forward_kl or lk."""

    steps: int = Field(default=3, ge=1, le=8)
    """Unrolled steps of the training-time test. From scratch over 120 requests (SmolLM2-135M, three
    domains, tree of 16) one pass with 2, 3, 4 steps gave 1.66, 1.62, 1.59, and three passes with 2
    and 4 gave 1.88 and 1.91: few while young and cheaper, more later."""

    step_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of step k is step_decay ** k (EAGLE-3)."""

    passes: int = Field(default=2, ge=1)
    """Passes over the window. In the same setting one and three passes gave 1.59 and 1.91."""

    learning_rate: float = Field(default=1.5e-3, gt=0)
    """Peak rate of AdamW. In the same setting 1e-3 and 2e-3 gave 1.59 and 1.68 after one pass, 1.91
    and 1.89 after three."""

    final_rate: float = Field(default=0.1, ge=0, le=1)
    """Rate at the end as a share of the peak; it falls along a half cosine."""

    warmup: int = Field(default=20, ge=0)
    """Updates until the peak rate; at most a tenth of the run."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay of weight matrices."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages of the gradient and of its square."""

    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""

    ema: float = Field(default=0.99, ge=0, lt=1)
    """Average of the weights that is published; 0: the last weights."""

    train_on_prompt: bool = True
    """Whether the prompt's positions count too: the target's distribution is known there. In the
    same setting 1.59 with and 1.55 without, for 1.5 times the time."""

    prompt_weight: float = Field(default=1.0, ge=0)
    """Weight of a prompt position against an answer position."""

    max_rows: int = Field(default=512, ge=8)
    """Rows of one request in one update, the last ones: bounds the memory."""

    autocast: bool = True
    """Compute in bfloat16, with weights in float32."""

    seed: int = 0
    """Seed of the order of requests."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where training and the gate's replay run; auto: the GPU when there is one."""

    threads: int = Field(default=1, ge=1)
    """CPU threads of the run."""

    nice: int = Field(default=10, ge=0, le=19)
    """Niceness of the process that trains."""

    max_seconds: float = Field(default=0.0, ge=0)
    """Wall-clock bound on training; the rate schedule follows it. 0: none."""

    patience: int = Field(default=0, ge=0)
    """Passes without a better accept length on the dev split before the run stops; 0: never."""

    window: int = Field(default=400, ge=1)
    """Most recent requests that a run looks at."""

    min_requests: int = Field(default=8, ge=1)
    """Fewer training requests than this, and the run is skipped."""

    dev_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of conversations kept for early stopping."""

    gate_share: float = Field(default=0.15, ge=0, lt=1)
    """Share of conversations that no run ever trains on: the evidence of the gate."""

    min_gate_requests: int = Field(default=4, ge=1)
    """Fewer gate requests than this, and the verdict is inconclusive."""

    depth: int = Field(default=4, ge=1)
    """Depth of the drafts that are replayed: the served one."""

    topk: int = Field(default=4, ge=1)
    """Top-k of the replayed drafts."""

    nodes: int = Field(default=16, ge=2)
    """Nodes of the replayed drafts, the root counted."""

    served_dtype: str = "bfloat16"
    """Dtype in which the server runs the drafter."""

    @model_validator(mode="after")
    def _known(self) -> TrainSettings:
        if self.objective not in NAMES:
            raise ValueError(f"objective must be one of {', '.join(NAMES)}")
        if self.dev_share + self.gate_share >= 1:
            raise ValueError("dev_share and gate_share leave nothing to train on")
        return self

    @property
    def shape(self) -> DraftShape:
        return DraftShape(self.depth, self.topk, self.nodes if self.topk > 1 else self.depth + 1)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
