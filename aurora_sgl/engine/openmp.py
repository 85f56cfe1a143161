"""How threads of a server on CPU wait for each other.

GNU OpenMP lets a thread that waits spin for milliseconds. Where others want the processor too, it
spins while the thread that it waits for does not run: two threads that meet 210 times in a step
took 1,490 ms for it beside two busy threads of another session, and 9 ms alone. Without spinning
that is 18 ms, but 16 alone, since waking a thread takes longer than most of what is shared. With
a thousand turns it is 29, and 9 alone (two cores of an AMD EPYC in a virtual machine).
"""

from __future__ import annotations

import os

_TURNS = "1000"
_SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_politely() -> None:
    """For the processes that are started from here: OpenMP reads its environment as it starts.
    What the user says about waiting stands."""
    if not any(name in os.environ for name in _SAID):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = _TURNS
