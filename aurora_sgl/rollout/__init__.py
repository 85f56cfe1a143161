"""What is live, and how it gets there: versions in and out, promote, roll back."""

from aurora_sgl.rollout.promote import Change, promote, rollback

__all__ = ["Change", "promote", "rollback"]
