"""Stepping back works against other sessions too, where the kernel shares by session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/self/autogroup")
#: Without autogroups the file is missing or empty: niceness then counts between sessions too.
HAS_AUTOGROUPS = AUTOGROUP.exists() and bool(AUTOGROUP.read_text().split())
SCRIPT = """
import os
from pathlib import Path
from aurora_sgl.priority import step_back
step_back(7)
group = Path("/proc/self/autogroup")
print(os.nice(0), (group.read_text().split() if group.exists() else [])[-1:])
"""


@pytest.mark.parametrize("own_session", [True, False])
def test_a_session_leader_takes_its_whole_session_back_and_nobody_else_does(
    own_session: bool,
) -> None:
    before = AUTOGROUP.read_text().split()[-1:] if HAS_AUTOGROUPS else []
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=own_session,
    )
    niceness, group = done.stdout.split()
    assert int(niceness) >= 7
    assert group == str(["7"] if own_session and HAS_AUTOGROUPS else before)
