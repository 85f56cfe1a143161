"""The recipe of a training run: one field a knob."""

from __future__ import annotations

from pydantic import Field, model_validator

from aurora_sgl.training.objectives import OBJECTIVES
from aurora_sgl.training.objectives.settings import ObjectiveSettings


class TrainSettings(ObjectiveSettings):
    """One recipe. What the defaults rest on is said beside each knob."""

    steps: int = Field(default=3, ge=1, le=8)
    """Unrolled steps of the training-time test. From scratch over 120 requests (SmolLM2-135M, three
    domains, tree of 16) one pass with 2, 3, 4 steps gave 1.66, 1.62, 1.59, and three passes with 2
    and 4 gave 1.88 and 1.91: few while young and cheaper, more later."""

    passes: int = Field(default=2, ge=1)
    """Passes over the window. In the same setting one and three passes gave 1.59 and 1.91."""

    least_updates: int = Field(default=0, ge=0)
    """Fewest updates of a run: a small window gets more passes. 0: ``passes`` alone. From
    scratch over 50 requests of one narrow form, 50, 100 and 400 updates (one, two and eight passes)
    gave a tree of 16 the accept length 1.52, 1.68 and 1.97 in 22, 39 and 143 s of one core
    (benchmarks/recipes.py; one seed). At 400 requests 400 updates can't be told from two passes.
    Left at 0 for the sake of that time; on a GPU (13 s) 400 is worth it."""

    young_updates: int = Field(default=200, ge=0)
    """``least_updates`` of a run whose base was trained on next to nothing (training/maturity.py):
    a first run has few requests, and most to learn from each."""

    optimizer: str = Field(default="adamw", pattern="^(adamw|muon)$")
    """What turns a gradient into a step: adamw, or muon for the layer's matrices with AdamW for the
    head and the vectors. From scratch over 90 narrow requests muon gave a tree of 16 the accept
    length 1.909 where adamw gave 1.792 at equal updates and 1.881 in three passes of about the same
    time (one seed). Refused on a CPU without bfloat16, which would take over 30 s for a step."""

    learning_rate: float = Field(default=1.5e-3, gt=0)
    """Peak rate for a base that was trained on next to nothing. In the same setting 1e-3
    and 2e-3 gave 1.59 and 1.68 after one pass, 1.91 and 1.89 after three."""

    mature_learning_rate: float = Field(default=3e-4, gt=0)
    """Peak rate for a mature base (see training/maturity.py); in between the rate falls with the
    tokens that the base was trained on. As much as ``learning_rate`` or more: one rate for all.
    At 1.5e-3 a drafter of 1.2 million tokens lost 0.095 on its own traffic, at 3e-4 it gained 19%
    on a new domain for 2.4% on the old one."""

    schedule: str = Field(default="cosine", pattern="^(cosine|constant)$")
    """Learning rate after the warm-up: a half cosine down to ``final_rate``, or constant."""

    final_rate: float = Field(default=0.1, ge=0, le=1)
    """Rate at the end of the cosine as a share of the peak."""

    warmup: int = Field(default=20, ge=0)
    """Updates until the peak rate; at most a tenth of the run."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay of weight matrices."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates for its averages of the gradient and of its square."""

    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""

    ema: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the moving average of the weights, which is published; 0: the last weights."""

    train_on_prompt: bool = True
    """Whether the prompt's positions count too: the target's distribution is known there. In the
    same setting 1.59 with and 1.55 without, for 1.5 times the time."""

    prompt_weight: float = Field(default=1.0, ge=0)
    """Weight of a prompt position against an answer position."""

    repeat_prefixes: bool = False
    """Whether rows that several prompts begin with (a system prompt, the earlier turns of a chat)
    are trained on in each of them, and not once."""

    after_rejection_weight: float = Field(default=1.0, gt=0)
    """Weight of rows from which the serving drafter drafted right after a rejection and failed
    again, against other answer rows; in between where it partly failed."""

    recency_half_life: float = Field(default=0.0, ge=0)
    """Half-life of a request's weight, counted in newer requests of the window; 0: equal ones."""

    replay_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of the trained requests that is drawn from traffic outside of the window, older or of
    other domains. After a turn to function completion half of it lost 0.7% of the accept length on
    the old traffic where none lost 3.2%, and gained 14% on the new where none gained 17%."""

    mature_replay_share: float = Field(default=0.5, ge=0, lt=1)
    """``replay_share`` of a run from a mature base (training/maturity.py), which has more to lose;
    not where ``replay_share`` is 0, or more. At a turn to a new form (100 requests, 3e-4) a half
    gained 19% as a quarter did, and lost 1.2% on the old traffic where a quarter lost 2.4%."""

    reservoir: int = Field(default=48, ge=0)
    """Requests of each domain whose traces are kept against forgetting, whatever their age
    (training/reservoir.py); up to a quarter of the traces' byte budget. 0: none."""

    batch_requests: int = Field(default=1, ge=1)
    """Number of requests in one update, which is one program however many there are."""

    batch_tokens: int = Field(default=0, ge=0)
    """Trained positions that one update gathers, whole requests at a time; 0: ``batch_requests``.
    From scratch (30,000 tokens, chain of 4) one request an update gave 1.248, four 1.216."""

    max_rows: int = Field(default=512, ge=8)
    """Largest number of rows of one request in one update, the last ones; it bounds the memory."""

    piece_bytes: int = Field(default=64 << 20, ge=1)
    """Bytes of one step's logits; a request with more rows is taken in parts, so that memory does
    not grow with vocabulary times tokens."""

    autocast: bool = True
    """Compute in bfloat16, with weights in float32, where the device multiplies bfloat16 itself. A
    CPU that does not takes float32, which is 3 to 4 times as fast there."""

    workers: int = Field(default=1, ge=1)
    """Processes that share each update's requests, through Ray Train; more than one needs the
    extra ``scale``."""

    threads: int = Field(default=1, ge=1)
    """CPU threads of the run."""

    nice: int = Field(default=10, ge=0, le=19)
    """Niceness of the process that trains."""

    max_seconds: float = Field(default=0.0, ge=0)
    """Wall-clock bound on training; the rate schedule follows it. 0: none."""

    resume: bool = True
    """Whether a run goes on where one of the same settings, base and requests was killed."""

    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Time between two checkpoints of a run, more where they would take over 2% of it; 0: none."""

    patience: int = Field(default=0, ge=0)
    """Passes without a better accept length on the dev split before the run stops; 0: never."""

    window: int = Field(default=400, ge=1)
    """Most recent requests that a run looks at."""

    window_hours: float = Field(default=0.0, ge=0)
    """Oldest age of a request in the window; 0: any."""

    domains: tuple[str, ...] = ()
    """Domains that the window takes; empty: all."""

    vocabulary_threshold: float = Field(default=0.85, ge=0, le=1)
    """Share of recent answer tokens that the draft vocabulary must hold, or it is refreshed before
    training. 0: never. At 66% a refresh gave 1.56 and 1.81 after one and three passes where none
    gave 1.45 and 1.54 (see drafter/refresh.py); at 90% it cost 200 requests before it paid."""

    line_search: bool = True
    """Whether replay on the dev split chooses how far to go from the live drafter towards the
    trained one (training/line_search.py); otherwise the whole way is taken."""

    explore: float = Field(default=0.0, ge=0, le=1)
    """Share of the runs that try one knob of the recipe another way; what past runs of the group
    earned then decides (training/recipe_bandit.py). 0: the recipe as given. The scheduler's runs
    have AURORA_SCHEDULER_EXPLORE."""

    training_cost: float = Field(default=1.0, ge=0)
    """Gain in accept length, in percent, that an hour of training has to bring: what the choice of
    recipes takes from a run's gain for its time."""

    min_requests: int = Field(default=8, ge=1)
    """Fewest training requests of a run; with fewer it is skipped."""

    dev_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of conversations kept for the line search and for early stopping. 0: neither."""

    dev_requests: int = Field(default=32, ge=1)
    """Number of requests of the dev split that are replayed: the newest, domains taking turns."""

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}")
        if self.dev_share + self.gate_share >= 1:
            raise ValueError("dev_share and gate_share leave nothing to train on")
        return self

    @property
    def needs_log(self) -> bool:
        """Whether the run must know what servers proposed, and not only what they answered."""
        return OBJECTIVES[self.objective].needs_proposals or self.after_rejection_weight != 1
