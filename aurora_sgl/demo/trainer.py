"""Training runs in the background of the demo: one process at a time, at low priority."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from aurora_sgl.processes.training import GRACE_SECONDS, TrainingProcess

_LOOK_SECONDS = 0.1
_STOP_SECONDS = GRACE_SECONDS + 7.0


class BackgroundTrainer:
    """Runs ``python -m aurora_sgl.training`` and passes its progress on."""

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._settings = dict(settings)
        self._environment = {**environment, "OMP_NUM_THREADS": "1"}
        self.process: TrainingProcess | None = None

    async def run(self, trigger: str, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """One run; the outcome as ``training.run.Outcome`` in JSON. A dead process is a failure."""
        loop = asyncio.get_running_loop()
        self.process = process = TrainingProcess(
            ["--continue", "--trigger", trigger, "--settings", json.dumps(self._settings)],
            self._environment,
            on_event=lambda event: _call(loop, progress, event),
        )
        try:
            return await _outcome(process)
        except asyncio.CancelledError:
            self.stop()
            await asyncio.wait_for(_outcome(process), _STOP_SECONDS)
            raise

    def stop(self) -> None:
        """End a run that is going on, with all that it started."""
        if self.process is not None:
            self.process.stop("the demo ended")


async def _outcome(process: TrainingProcess) -> dict[str, Any]:
    while (outcome := process.outcome()) is None:
        await asyncio.sleep(_LOOK_SECONDS)
    return outcome


def _call(
    loop: asyncio.AbstractEventLoop,
    progress: Callable[[dict[str, Any]], None],
    event: dict[str, Any],
) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(progress, event)
