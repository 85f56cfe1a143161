"""How threads of a server on CPU wait for each other.

GNU OpenMP lets a thread that waits spin for milliseconds. Where others want the processor too, it
spins while the thread that it waits for does not run. The layers and the head of a target of 135M
parameters on two threads took 14 ms a step alone, and 830 ms beside two busy threads (nice 10) of
another session. Without any spinning that is 29 ms, but 17 to 20 alone, since waking a thread takes
longer than most of what is shared. With two thousand turns it is 44, and 14 alone (two cores of an
AMD EPYC in a virtual machine).
"""

from __future__ import annotations

import os

_TURNS = "2000"
_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_politely() -> None:
    """For the processes that are started from here: OpenMP reads its environment as it starts.
    What the user says about waiting stands."""
    if not any(name in os.environ for name in _VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = _TURNS
