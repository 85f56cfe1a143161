"""Stepping back works against other sessions too, where the kernel shares by session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/self/autogroup")
SCRIPT = """
import os
from pathlib import Path
from aurora_sgl.priority import step_back
step_back(7)
print(os.nice(0), Path("/proc/self/autogroup").read_text().split()[-1])
"""


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="a kernel without autogroups")
@pytest.mark.parametrize("own_session", [True, False])
def test_a_session_leader_takes_its_whole_session_back_and_nobody_else_does(
    own_session: bool,
) -> None:
    before = AUTOGROUP.read_text().split()[-1]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=own_session,
    )
    niceness, group = done.stdout.split()
    assert int(niceness) >= 7
    assert group == ("7" if own_session else before)
