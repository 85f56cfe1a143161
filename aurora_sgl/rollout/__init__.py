"""What is live, and how it gets there: versions in and out, promote, roll back, gate, trial, watch.

People and programs act through these functions; each change says who did it and why.
"""

from aurora_sgl.rollout import switches
from aurora_sgl.rollout.pins import PinChange, pin, unpin
from aurora_sgl.rollout.promote import Change, promote, rollback

__all__ = ["Change", "PinChange", "pin", "promote", "rollback", "switches", "unpin"]
