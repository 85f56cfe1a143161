"""The benchmark of a store that goes away, short and without training: a real server, a real
PostgreSQL that is stopped as by a power cut, traffic all the time, and every step counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import ROOT


def test_while_the_store_is_away_no_request_fails_and_afterwards_no_step_is_missing(
    model: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.outage", "--no-training", "--json",
         "--seconds", "15", "--model", str(model)],
        capture_output=True, text=True, timeout=900, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout)["rows"]
    assert row["failed"] == row["unexplained"] == 0
    assert row["meanwhile"] > 0 and row["spooled KiB"] > 0, "it served, and records waited"
    assert row["stored"] == row["verify steps made"] > 100
