"""How threads of a server on CPU wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: The child loads the OpenMP that PyTorch brings, which says at once how it waits.
SCRIPT = """
import subprocess, sys
import aurora_sgl.engine.launch
subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)
"""
CHILD = """
import ctypes, importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec('torch').origin).parent
ctypes.CDLL(str(next(folder.glob('lib/libgomp*'))))
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("said", "spins"),
    [
        ({}, "2000"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
    ],
    ids=str,
)
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(
    said: dict[str, str], spins: str
) -> None:
    """As OpenMP itself says it, in a process that is started from the launcher."""
    environment = {**os.environ, "AURORA_CPU": "1", "OMP_DISPLAY_ENV": "verbose"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, CHILD],
        capture_output=True,
        text=True,
        env={**environment, **said},
        check=True,
    )
    last = run.stderr.split("OPENMP DISPLAY ENVIRONMENT BEGIN")[-1]
    assert f"GOMP_SPINCOUNT = '{spins}'" in last
