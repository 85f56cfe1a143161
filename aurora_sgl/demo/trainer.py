"""Training runs in the background of the demo: one process at a time, at low priority."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from typing import Any


class BackgroundTrainer:
    """Runs ``python -m aurora_sgl.training`` and passes its progress on."""

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._settings = dict(settings)
        self._environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        self._process: Process | None = None

    async def run(self, trigger: str, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """One run; the outcome as ``training.run.Outcome`` in JSON. A dead process is a failure."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "aurora_sgl.training",
            "--trigger",
            trigger,
            "--settings",
            json.dumps(self._settings),
            stdout=PIPE,
            stderr=PIPE,
            stdin=asyncio.subprocess.DEVNULL,
            env=self._environment,
            start_new_session=True,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        last_words = ""
        async for line in self._process.stderr:
            text = line.decode(errors="replace").strip()
            try:
                progress(json.loads(text))
            except ValueError:
                last_words = text or last_words
        output = (await self._process.stdout.read()).decode()
        code = await self._process.wait()
        try:
            outcome: dict[str, Any] = json.loads(output)
        except ValueError:
            return {"status": "failed", "error": f"the trainer ended with {code}: {last_words}"}
        return outcome

    def stop(self) -> None:
        """End a run that is going on, with all that it started."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
