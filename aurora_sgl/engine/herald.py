"""What is left of us in a scheduler in which the agent could not start: it says so in the store."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from aurora_sgl import environment, wire
from aurora_sgl.config import get_settings
from aurora_sgl.engine import clean, startup
from aurora_sgl.engine.channel import Channel
from aurora_sgl.engine.describe import describe_worker, identity
from aurora_sgl.engine.recorder import new_boot_id

_HELLO_SECONDS = 2.0


class Herald:
    """Says hello to the sidecar, and why nothing else comes from here."""

    def __init__(self, description: dict[str, Any], why: str) -> None:
        rank = str(description.get("dp_rank", 0))
        folder = Path(environment.value(environment.ENDPOINT)) / rank
        self.boot_id = new_boot_id()
        self.description = {**description, "unknown_drafter": f"the plugin did not start: {why}"}
        self.notices = {
            **startup.notices_of_start(),
            "agent": (
                f"The plugin could not start in this server ({why}): nothing is recorded, traced "
                "or swapped. Serving goes on; its log has the whole error."
            ),
        }
        self._channel = Channel(folder, self.boot_id, get_settings().record_buffer)
        self._said_hello = -_HELLO_SECONDS

    @classmethod
    def of(cls, worker: Any, error: Exception) -> Herald | None:
        """None where nobody would hear it, or on a rank that does not lead."""
        if not environment.value(environment.ENDPOINT):
            return None
        try:
            description, leads = describe_worker(worker)
        except Exception:
            description, leads = _least(worker), int(getattr(worker, "tp_rank", 0) or 0) == 0
        return cls(description, _one_line(error)) if leads else None

    def poll(self) -> None:
        """Between two steps. Never waits."""
        now = time.monotonic()
        if now - self._said_hello >= _HELLO_SECONDS:
            self._said_hello = now
            self._channel.put([self.hello()])
        self._channel.flush()
        while self._channel.receive() is not None:
            pass  # nothing can be done for the sidecar here

    def hello(self) -> wire.Hello:
        return wire.Hello(
            boot_id=self.boot_id,
            pid=os.getpid(),
            server=self.description,
            live_version_id=0,
            swap_count=0,
            dropped=self._channel.dropped_records,
            counters={},
            notices=dict(self.notices),
        )


def _least(worker: Any) -> dict[str, Any]:
    """Of a worker of another make than ``describe_worker`` knows."""
    args = getattr(worker, "server_args", None)
    drafter = getattr(getattr(worker, "draft_worker", None), "draft_runner", None)
    model = getattr(drafter, "model", None)
    return {
        **_identity(args),
        "target_model": str(getattr(args, "model_path", "")),
        "target_revision": str(getattr(args, "revision", None) or ""),
        "draft_architecture": type(model).__name__ if model is not None else "",
        "drafter_path": str(getattr(args, "speculative_draft_model_path", None) or ""),
    }


def _identity(args: Any) -> dict[str, Any]:
    """Each replica its own, where SGLang says which one this is."""
    try:
        from sglang.srt.runtime_context import get_parallel

        return identity(args, get_parallel())
    except Exception:
        return identity(args, None)


def _one_line(error: Exception) -> str:
    return clean.text(" ".join(f"{type(error).__name__}: {error}".split()), 300)
