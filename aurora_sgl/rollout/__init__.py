"""What is live, and how it gets there: versions in and out, promote, roll back, gate, trial, watch.

People and programs act through these functions; each change says who did it and why:
``promote``, ``rollback``, ``stages.start``, ``stages.go_on``, ``stages.abort``, ``freezes.add``,
``freezes.lift``, ``pin``, ``unpin``, ``switches.turn``, ``trial.start``, ``trial.stop``,
``notes.add_note``, ``notes.tag``, ``notes.untag``.
What goes on is read with ``status.look`` (or its parts), ``watch.status``, ``trial.status``,
``stages.current``.
"""

from aurora_sgl.rollout import freezes, limits, notes, stages, status, switches, trial, watch
from aurora_sgl.rollout.pins import PinChange, pin, unpin
from aurora_sgl.rollout.promote import Change, promote, rollback

__all__ = [
    "Change",
    "PinChange",
    "freezes",
    "limits",
    "notes",
    "pin",
    "promote",
    "rollback",
    "stages",
    "status",
    "switches",
    "trial",
    "unpin",
    "watch",
]
