"""Checkpoints of a run that is going on, so that a killed one loses a minute and not an hour.

A group has one folder of them: ``plan.json`` says what the run trains on, ``state.pt`` how far it
came. Both are written beside their place and renamed, so either is whole or not there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from aurora_sgl import atomic
from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.training.settings import TrainSettings

#: What may differ between a run and the one that takes it up: it changes no weight.
_OF_THE_MACHINE = {"nice", "threads", "resume", "checkpoint_seconds", "device"}
#: Seconds after which a run that was left is not taken up any more.
_STALE = 24 * 3600.0
#: Part of a run's time that checkpoints may take, about; what a second writes of one until the
#: first was timed (a SATA disk); and what must stay free beside one, for all else on the disk.
SHARE, _BYTES_A_SECOND, _LEFT_FREE = 0.02, 500e6, 1 << 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """What fixes the outcome of a run: settings, base weights, and the requests in their parts."""

    settings: dict[str, Any]
    base_sha256: str
    window: list[int]  # request ids
    replay: list[int]
    dev: list[int]
    held_out: list[int]

    @property
    def key(self) -> str:
        return sha256_bytes(json.dumps(asdict(self), sort_keys=True).encode())


def settings_of(settings: TrainSettings) -> dict[str, Any]:
    """The settings that a run and its continuation must share."""
    return {k: v for k, v in settings.as_json().items() if k not in _OF_THE_MACHINE}


class Checkpoints:
    """The folder of one group. Nothing here raises: a run goes on without a checkpoint.

    There is one every ``seconds``, and less often where that would take more than ``share`` of the
    run: a drafter, its average and AdamW's two moments are 16 bytes a parameter.
    """

    def __init__(self, folder: Path, seconds: float, share: float = SHARE) -> None:
        self.folder, self.seconds, self.share = folder, seconds, share
        self.key = ""
        self.size = 0  # bytes of one, as far as is known
        self.took = 0.0  # seconds that the last one took, or the first is thought to take
        self.saved_at = time.monotonic()
        self.saved = 0
        self.error = ""  # why the last checkpoint could not be written

    def left_behind(self, settings: TrainSettings, base_sha256: str) -> RunPlan | None:
        """What a killed run of these settings and this base was going to train on."""
        try:
            path = self.folder / "plan.json"
            if time.time() - path.stat().st_mtime > _STALE:
                return None
            plan = RunPlan(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        same = plan.settings == settings_of(settings) and plan.base_sha256 == base_sha256
        return plan if same else None

    def begin(self, plan: RunPlan) -> None:
        """From here on checkpoints belong to this plan; those of another one go."""
        self.key = plan.key
        if self._read_key() == plan.key:
            return
        self.clear()
        if self.seconds:
            self._write("plan.json", lambda path: path.write_text(json.dumps(asdict(plan))))

    def load(self) -> dict[str, Any] | None:
        """The state that :meth:`save` was given; None when there is none of this plan."""
        try:
            state: dict[str, Any] = torch.load(
                self.folder / "state.pt", map_location="cpu", weights_only=False
            )
        except Exception:  # missing, cut short by a full disk, of another torch: start anew
            return None
        return state if state.get("key") == self.key else None

    def expect(self, size: int) -> None:
        """Bytes that a checkpoint will have, before there is one."""
        if not self.saved:
            self.size, self.took = size, size / _BYTES_A_SECOND

    @property
    def is_affordable(self) -> bool:
        """Whether one more now leaves all of them within their share of the time."""
        return self.share * (time.monotonic() - self.saved_at) >= self.took

    @property
    def is_due(self) -> bool:
        waited = time.monotonic() - self.saved_at
        return bool(self.seconds) and waited >= self.seconds and self.is_affordable

    def save(self, state_of: Callable[[], dict[str, Any]]) -> None:
        """Write the state; the one before stays until this one is whole. Without room on the disk
        there is none, which is said once."""
        begun = time.monotonic()
        before = self.error
        if self._has_room():
            state = {**state_of(), "key": self.key}
            self._write("state.pt", lambda path: self._save(state, path))
        if self.error and self.error != before:
            log.warning("%s; training goes on", self.error)
        self.saved += not self.error
        self.saved_at = time.monotonic()
        if not self.error:
            self.took = self.saved_at - begun

    def _has_room(self) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError:
            return True  # what is wrong is said by who writes
        if free >= self.size + _LEFT_FREE:
            return True
        self.error = (
            f"no checkpoint: one has {self.size / 1e9:,.1f} GB, and too little is free for it on "
            f"the disk of {self.folder}"
        )
        return False

    def _save(self, state: dict[str, Any], path: Path) -> None:
        _save(state, path)
        self.size = path.stat().st_size

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read_key(self) -> str:
        try:
            return RunPlan(**json.loads((self.folder / "plan.json").read_text())).key
        except (OSError, ValueError, TypeError):
            return ""

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            with atomic.written(self.folder / name) as new:
                write(new)
            self.error = ""
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer, on a full disk
            self.error = f"no checkpoint: {' '.join(str(error).split())[:200]}"


def _save(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
