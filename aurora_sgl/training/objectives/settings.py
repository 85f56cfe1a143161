"""The knobs that objectives read: the part of a recipe that says what the training loss is."""

from __future__ import annotations

from pydantic import Field

from aurora_sgl.evaluation.settings import EvaluationSettings


class ObjectiveSettings(EvaluationSettings):
    """A knob of an objective is one field here; its ``from_settings`` reads it."""

    objective: str = "reach_kl"
    """Training loss: reach_kl, forward_kl, tree_reward, lk, expected_accept_length,
    policy_gradient or distil_then_rl. After 64 requests reach_kl is ahead of forward_kl by 0.030
    (tree) and 0.025 (chain) from scratch, from a well-trained drafter by 0.019, 0.010, 0.000 (tree)
    and -0.004, 0.021, -0.005 (chain; chat and two seeds of one form), in a fifth less time."""

    step_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of step k is step_decay ** k (EAGLE-3)."""

    reach_topk: int = Field(default=4, ge=1)
    """reach_kl and tree_reward train step k only where the path so far lies in the drafter's so
    many most likely tokens."""

    reach_decay: float = Field(default=1.0, gt=0, le=1)
    """Weight of step k of reach_kl and tree_reward is reach_decay ** k."""

    tree_reward_weight: float = Field(default=1.0, ge=0)
    """Weight of the tree's expected accepted drafts against the KL in tree_reward."""

    lk_eta: float = Field(default=3.0, gt=0)
    """How fast lk turns from KL to acceptance as the acceptance probability a grows: KL keeps the
    weight exp(-lk_eta * a)."""

    reward_weight: float = Field(default=1.0, ge=0)
    """Weight of the expected accepted drafts against forward KL in expected_accept_length."""

    inclusion_temperature: float = Field(default=1.0, gt=0)
    """How soft expected_accept_length and tree_reward take the question whether a token is among a
    tree's top-k, in nats."""

    rl_share: float = Field(default=0.3, ge=0, le=1)
    """Part of a run, at its end, in which tree_reward and distil_then_rl reinforce on top."""

    rl_kl_weight: float = Field(default=1.0, ge=0)
    """Weight of their KL to the target in that part."""

    rl_group: int = Field(default=8, ge=2)
    """Drafts that the policy gradient samples from each row."""

    rl_reuse: int = Field(default=2, ge=1)
    """Visits of a request for which its sampled drafts are used."""

    rl_clip: float = Field(default=0.2, gt=0)
    """PPO's bound on how far the importance ratio counts away from 1."""

    rl_beta: float = Field(default=0.1, ge=0)
    """Weight of the KL to the drafter as it was when reinforcement began."""

    rl_logged_weight: float = Field(default=1.0, ge=0)
    """Weight of what servers proposed against sampled drafts."""

    rl_depth_cost: float = Field(default=0.0, ge=0, lt=1 / 8)
    """What a draft is worth less for each step of depth."""
