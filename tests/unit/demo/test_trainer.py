"""The trainer beside the demo ends with it, without a word from the event loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import asyncio
from aurora_sgl.demo.trainer import BackgroundTrainer

trainer = BackgroundTrainer({}, {})

async def main():
    run = asyncio.create_task(trainer.run("requests", print))
    while trainer.process is None:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)  # it is still importing PyTorch

asyncio.run(main())
print("ended", trainer.process.outcome()["error"])
"""


def test_a_demo_that_ends_takes_the_trainer_with_it_in_silence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "AURORA_HOME": str(tmp_path)},
    )
    assert done.stdout.split() == ["ended", "the", "demo", "ended"]
    assert done.stderr == ""
