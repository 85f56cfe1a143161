"""What our processes import before they do anything."""

from __future__ import annotations

import subprocess
import sys

#: Slow to import, and needed by what trains, judges, imports weights or upgrades alone.
SLOW = ("alembic", "fastapi", "scipy", "sglang", "torch", "transformers")


def test_scheduler_and_sidecar_start_without_what_is_slow_to_import() -> None:
    """Each of them took three times the processor while a name in a signature brought PyTorch."""
    code = (
        "import sys, aurora_sgl.cli, aurora_sgl.scheduler.service, aurora_sgl.sidecar.__main__;"
        f"print([name for name in {SLOW} if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
