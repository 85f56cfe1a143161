"""The report of the GPU tests: what it says of a run of pytest, and that it needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_report


def test_the_report_counts_tests_and_gives_a_reason_for_each_that_did_not_pass(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 + 1 == 3, 'sums are off'\n"
        "def test_absent(): pytest.importorskip('no_such_package')\n"
    )
    (folder / "test_broken.py").write_text("import no_such_package\n")
    found = gpu_report.run_tests(folder, tmp_path / "junit.xml")
    row = {"what": "training", "size": "demo", "length": 0, "own": 0, "dtype": "bfloat16"}
    speed = {
        "rows": [
            {**row, "attention": "sdpa", "tokens_per_second": 12.5, "ratio": 1.0, "peak_mib": 3.0},
            {**row, "attention": "flex", "failed": "RuntimeError: no"},
        ]
    }
    text = gpu_report.markdown({"commit": "abc", "device": "some GPU"}, found, speed)
    assert "**1 passed, 2 failed, 1 skipped**" in text
    assert "- commit: abc" in text and "| test_some | 1 | 1 | 1 |" in text
    assert "sums are off" in text and "No module named 'no_such_package'" in text
    assert "collection failure" in text, "a file that does not import must not pass unseen"
    assert "| sdpa | bfloat16 | 12.50 |  | 1.00 | 3.00 |" in text and "failed: RuntimeError" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_no_report_is_written(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    command = [sys.executable, gpu_report.__file__, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and not out.exists()
