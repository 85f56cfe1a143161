"""A swap from the sidecar's command to the live weights, the same on every rank.

The leading rank turns the command into requests of its own that travel through the scheduler's
request path, so that all ranks of a tensor-parallel group see them at the same place: first stage,
then apply. Before they apply, the ranks agree: all copy at this step, or none does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aurora_sgl import wire
from aurora_sgl.engine.draft_kv import LiveVersion
from aurora_sgl.engine.swap import StagedWeights, Swapper, yield_to_the_step

logger = logging.getLogger("aurora_sgl")

_RETRY_SECONDS = 0.1  # between two questions whether all ranks have staged
_FAILED, _BUSY, _READY = 0, 1, 2  # what a rank says of its staging; the smallest decides


@dataclass(frozen=True, slots=True)
class StageSwap:
    """To every rank: stage these weights."""

    version_id: int
    path: str
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class ApplySwap:
    """To every rank: if all have staged the version, copy it in, all at this step."""

    version_id: int


COMMANDS = (StageSwap, ApplySwap)


def abstain(command: StageSwap | ApplySwap) -> None:
    """On a rank that takes no part in swaps: say so where the others wait for its word."""
    if isinstance(command, ApplySwap):
        from sglang.srt.distributed.parallel_state import get_tp_group

        _worst_of_all_ranks(_FAILED, get_tp_group().world_size)


def _worst_of_all_ranks(mine: int, tp_size: int) -> int:
    if tp_size == 1:
        return mine
    from sglang.srt.distributed.parallel_state import get_tp_group

    agreed = torch.tensor([mine])
    torch.distributed.all_reduce(
        agreed, op=torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group
    )
    return int(agreed[0])


class SwapDriver:
    """One per scheduler process; ``report`` takes a ``SwapDone`` and may be called by a thread."""

    def __init__(
        self,
        swapper: Swapper,
        live: LiveVersion,
        boot_id: int,
        *,
        tp_size: int,
        report: Callable[[wire.SwapDone], None] | None,
    ) -> None:
        self._swapper, self._live, self._boot_id = swapper, live, boot_id
        self._tp_size, self._report = tp_size, report
        self.forward_stream: Any = None  # where SGLang's steps run on a GPU
        self._asked: StageSwap | None = None
        self._deadline_us = 0
        self._apply_after = 0.0

    def ask(self, command: wire.Stage) -> None:
        """On the leading rank: the sidecar wants a version live."""
        if self._swapper.busy or self._asked is not None:
            self._refuse(command.version_id, "another swap is being staged")
            return
        self._asked = StageSwap(command.version_id, command.path, command.weights_sha256)
        self._deadline_us = command.deadline_us
        self._apply_after = 0.0

    def next_command(self) -> StageSwap | ApplySwap | None:
        """On the leading rank: what to put among the received requests now."""
        if self._asked is not None:
            asked, self._asked = self._asked, None
            return asked
        staged, failure = self._swapper.staged, self._swapper.failure
        if (staged is None and failure is None) or time.monotonic() < self._apply_after:
            return None
        self._apply_after = time.monotonic() + _RETRY_SECONDS
        return ApplySwap(staged.version_id if staged is not None else failure[0])  # type: ignore[index]

    def obey(self, command: StageSwap | ApplySwap) -> None:
        """On every rank, at the same place in the request stream."""
        if isinstance(command, StageSwap):
            self._stage(command)
            return
        # Whatever goes wrong on this rank, the others wait for its word, here and once more.
        mine, reason = self._word(command)
        worst = _worst_of_all_ranks(mine, self._tp_size)
        if worst == _BUSY:
            return  # the leading rank asks again
        staged = self._swapper.staged
        self._swapper.failure = self._swapper.staged = None
        if worst == _FAILED or staged is None:
            self._refuse(command.version_id, reason or "another rank could not stage the weights")
            return
        error = self._copy_in(staged)
        worst = _worst_of_all_ranks(_READY if error is None else _FAILED, self._tp_size)
        if error is not None:
            self._refuse(staged.version_id, f"copying failed: {type(error).__name__}: {error}")
            raise error
        if worst == _FAILED:
            self._refuse(staged.version_id, "another rank could not copy the weights")
            return
        self._is_live(staged)

    def _word(self, command: ApplySwap) -> tuple[int, str]:
        """What this rank says of its staging, and why where that failed. Never raises."""
        try:
            if 0 < self._deadline_us < wire.now_us():
                return _FAILED, "staging took longer than the sidecar waits"
            stands = self._stands(command)
            failure = self._swapper.failure if stands == _FAILED else None
        except Exception as error:
            return _FAILED, f"{type(error).__name__}: {error}"
        return stands, failure[1] if failure else ""

    def _copy_in(self, staged: StagedWeights) -> Exception | None:
        """Copy and say what went wrong; None: nothing. Never raises."""
        try:
            staged.apply_ms = self._swapper.apply(staged, self.forward_stream)
        except Exception as error:
            return error
        return None

    def _stage(self, command: StageSwap) -> None:
        try:
            path = Path(command.path)
            self._swapper.begin_staging(command.version_id, path, command.weights_sha256)
        except Exception as error:  # such as no room for a thread: said where the ranks agree
            self._swapper.failure = (command.version_id, f"{type(error).__name__}: {error}")

    def _stands(self, command: ApplySwap) -> int:
        """How far this rank is with the version."""
        staged = self._swapper.staged
        if staged is not None and staged.version_id == command.version_id:
            return _READY
        return _BUSY if self._swapper.busy else _FAILED

    def _refuse(self, version_id: int, reason: str) -> None:
        if self._report is not None:
            self._report(self._done(version_id, False, reason, "", 0.0, 0.0))

    def _done(self, version_id: int, ok: bool, *rest: Any) -> wire.SwapDone:
        return wire.SwapDone(self._boot_id, wire.now_us(), version_id, ok, *rest)

    def _is_live(self, staged: StagedWeights) -> None:
        apply_ms = staged.apply_ms
        self._live.swapped(staged.version_id)
        logger.info("aurora: drafter version %d is live (%.1f ms)", staged.version_id, apply_ms)
        report = self._report
        if report is None:
            return

        def read_back() -> None:
            yield_to_the_step()
            try:
                digest, reason = self.read_back(staged), ""
            except Exception as error:
                digest, reason = "", f"reading the live weights back failed: {error}"
            times = (staged.staged_ms, apply_ms)
            report(self._done(staged.version_id, not reason, reason, digest, *times))

        threading.Thread(target=read_back, name="aurora-read-back", daemon=True).start()

    def read_back(self, staged: StagedWeights) -> str:
        """The live hash, computed from the model's own tensors."""
        return self._swapper.read_back(staged, whole=self._tp_size == 1)

    def read_back_at_start(self, drafter: Path) -> str:
        """The live hash of the drafter that the server was started with."""
        return self.read_back(self._swapper.stage(0, drafter, None))
