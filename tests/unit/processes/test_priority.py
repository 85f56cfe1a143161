"""Stepping back works against other sessions too, where the kernel shares by session."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

#: Where there are no autogroups the file is missing; a process of the root group reads it empty.
#: Niceness then counts between sessions too.
SCRIPT = """
import json, os
from pathlib import Path
from aurora_sgl.processes.priority import step_back
def group():
    path = Path("/proc/self/autogroup")
    return path.read_text().split()[-1:] if path.exists() else []
before = group()
step_back(7)
print(json.dumps([os.nice(0), before, group()]))
"""


@pytest.mark.parametrize("own_session", [True, False])
def test_a_session_leader_takes_its_whole_session_back_and_nobody_else_does(
    own_session: bool,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=own_session,
    )
    niceness, before, after = json.loads(done.stdout)
    assert niceness >= 7
    assert after == (["7"] if own_session and before else before)
