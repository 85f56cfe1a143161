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

_STOP_SECONDS = 10.0


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
        try:
            return await self._follow(self._process, progress)
        except asyncio.CancelledError:
            self.stop()
            with contextlib.suppress(TimeoutError):  # its pipes close before the event loop does
                await asyncio.wait_for(self._process.communicate(), _STOP_SECONDS)
            raise

    async def _follow(
        self, process: Process, progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        assert process.stdout is not None and process.stderr is not None
        last_words = ""
        async for line in process.stderr:
            text = line.decode(errors="replace").strip()
            try:
                progress(json.loads(text))
            except ValueError:
                last_words = text or last_words
        output = (await process.stdout.read()).decode()
        code = await process.wait()
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
